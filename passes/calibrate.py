"""Set the ranges of activations: observers see the calibration images and become fake-quantizers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.rewrite import plan_of, quantized_layers


def calibrate(gm: fx.GraphModule, batches: Sequence[Tensor]) -> fx.GraphModule:
    """Run ``batches`` (B, 3, H, W) through ``gm`` and freeze its observers at the ranges they saw.

    ``gm`` is changed and returned, in the mode it was in; the ranges are written into its plan. Layers whose
    ranges are set already keep them.

    Raises:
        FmpqError: an input is not finite.
    """
    layers = quantized_layers(gm).items()
    observers = {
        name: layer.input_quantizer
        for name, layer in layers
        if layer.input_quantizer is not None and layer.input_quantizer.observing
    }
    if not observers:
        return gm
    for observer in observers.values():
        observer.observe()  # what was run before this, with other weights perhaps, does not count
    training = gm.training
    gm.eval()
    with torch.no_grad():
        for x in batches:
            gm(x)
    gm.train(training)
    for name, observer in observers.items():
        if not all(map(math.isfinite, observer.range)):
            raise FmpqError(
                f"the input of {name!r} is not finite on the calibration images once the weights are quantized; "
                "allow more bits, or pass activation_bits=None"
            )
        observer.freeze(*observer.range, observer.integral)
    plan = plan_of(gm)
    gm.meta["fmpq"] = replace(
        plan,
        ranges={**plan.ranges, **{name: observer.range for name, observer in observers.items()}},
        integral=(*plan.integral, *(name for name, observer in observers.items() if observer.integral)),
    )
    return gm
