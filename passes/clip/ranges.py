"""Set the ranges of activations: observers see the calibration images and become fake-quantizers.

The range is what was seen, or less where that lowers the RD loss: a few large values, which clipping hardly
hurts, would make the steps of all others coarse. As for weights, the RD loss decides, site after site.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.clip.descent import choose
from fmpq_fx.passes.clip.output_errors import Setter
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.measure.bench import Bench, mean_rd
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.quant import ActivationFakeQuant, quantized_layers, weights_kept

CLIPS = (0.8, 0.6, 0.5, 0.4, 0.3)
"""Parts of the range seen that are tried, until one is no better."""


def calibrate(gm: fx.GraphModule, bench: Bench) -> float:
    """Give the activation quantizers of ``gm`` their ranges, from the images of ``bench``.

    Args:
        gm: a rewritten graph in evaluation mode. It is changed, and the ranges are written into its plan. Layers
            whose ranges are set already keep them.
        bench: what is observed, and what the RD loss is measured on.

    Returns:
        the RD loss of ``gm`` afterwards.

    Raises:
        FmpqError: an input is not finite.
    """
    lmbda = plan_of(gm).lmbda
    observers = {
        site: layer.input_quantizer
        for site, layer in quantized_layers(gm).items()
        if layer.input_quantizer is not None and layer.input_quantizer.observing
    }
    if not observers:
        return mean_rd(gm, bench, lmbda)
    _observe(gm, bench, observers)
    setters = {site: _clip_of(quantizer) for site, quantizer in observers.items() if not quantizer.integral}
    _, rd = choose(gm, bench, lmbda, setters, (1.0, *CLIPS), "activation ranges")
    plan = plan_of(gm)
    calibrated = replace(
        plan,
        ranges={**plan.ranges, **{site: quantizer.range for site, quantizer in observers.items()}},
        integral=(*plan.integral, *(site for site, quantizer in observers.items() if quantizer.integral)),
    )
    annotate_graph(gm, plan=calibrated)
    return rd


def _observe(gm: fx.GraphModule, bench: Bench, quantizers: Mapping[str, ActivationFakeQuant]) -> None:
    """Freeze the quantizers at the ranges of their inputs."""
    for quantizer in quantizers.values():
        quantizer.observe()  # what was run before this, with other weights perhaps, does not count
    with torch.no_grad(), weights_kept(gm), freed_memory_kept():
        for x in bench.ranks.share(bench.pieces):
            output_of(gm, x)
    seen = bench.ranks.gather([(*quantizer.range, quantizer.integral) for quantizer in quantizers.values()])
    for (site, quantizer), of_ranks in zip(quantizers.items(), zip(*seen, strict=True), strict=True):
        lows, highs, integral = zip(*of_ranks, strict=True)
        low, high = float(np.min(lows)), float(np.max(highs))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FmpqError(
                f"the input of {site!r} is not finite on the calibration images once the weights are quantized; "
                "allow more bits, or pass activation_bits=None"
            )
        quantizer.freeze(low, high, all(integral))


def _clip_of(quantizer: ActivationFakeQuant) -> Setter:
    """Return what clips ``quantizer`` at a part of the range that it has now."""
    low, high = quantizer.range

    def set_clip(clip: float) -> None:
        quantizer.freeze(low * clip, high * clip, integral=False)

    return set_clip
