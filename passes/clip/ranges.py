"""Set the ranges of activations: observers see the calibration images and become fake-quantizers.

The range is what was seen, or less where that lowers the RD loss: a few large values, which clipping hardly
hurts, would make the steps of all others coarse. As for weights, the RD loss decides, site after site.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from fmpq_fx import ranks
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.clip.descent import RDDescent
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.measure.incremental import mean_rd, parts_of, run_part
from fmpq_fx.progress import reported
from fmpq_fx.quant import ActivationFakeQuant, QuantizedLayer, quantized_layers, weights_kept

CLIPS = (0.8, 0.6, 0.5, 0.4, 0.3)
"""Parts of the range seen that are tried, until one is no better."""


def calibrate(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    *,
    memory: int | None = None,
    progress: bool | None = None,
) -> float:
    """Give the activation quantizers of ``gm`` their ranges, from the images ``batches``.

    Args:
        gm: a rewritten graph in evaluation mode. It is changed, and the ranges are written into its plan. Layers
            whose ranges are set already keep them.
        batches: calibration images, (B, 3, H, W) each, in [0, 1].
        memory: bytes of activations to keep at most, see :class:`ChangeMeter`.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Returns:
        the RD loss of ``gm`` on ``batches`` afterwards.

    Raises:
        FmpqError: an input is not finite.
    """
    observers = {
        site: (layer, layer.input_quantizer)
        for site, layer in quantized_layers(gm).items()
        if layer.input_quantizer is not None and layer.input_quantizer.observing
    }
    if not observers:
        return mean_rd(gm, batches, plan_of(gm).lmbda)
    quantizers = {site: quantizer for site, (_, quantizer) in observers.items()}
    _observe(gm, batches, quantizers)
    clippable = {site: both for site, both in observers.items() if not both[1].integral}
    with RDDescent(gm, batches, plan_of(gm).lmbda, list(clippable), memory=memory) as descent:
        for site, (layer, quantizer) in reported(
            clippable.items(), "activation ranges", "site", show=progress
        ):
            _clip_range(descent, site, layer, quantizer)
        rd = descent.rd
    plan = plan_of(gm)
    calibrated = replace(
        plan,
        ranges={**plan.ranges, **{site: quantizer.range for site, quantizer in quantizers.items()}},
        integral=(*plan.integral, *(site for site, quantizer in quantizers.items() if quantizer.integral)),
    )
    annotate_graph(gm, plan=calibrated)
    return rd


def _observe(
    gm: fx.GraphModule, batches: Sequence[Tensor], quantizers: dict[str, ActivationFakeQuant]
) -> None:
    """Freeze the quantizers at the ranges of their inputs for ``batches``."""
    for quantizer in quantizers.values():
        quantizer.observe()  # what was run before this, with other weights perhaps, does not count
    with torch.no_grad(), weights_kept(gm), freed_memory_kept():
        for x in ranks.share(parts_of(batches)):
            run_part(gm, x)
    seen = ranks.gathered([(*quantizer.range, quantizer.integral) for quantizer in quantizers.values()])
    for (site, quantizer), of_ranks in zip(quantizers.items(), zip(*seen, strict=True), strict=True):
        lows, highs, integral = zip(*of_ranks, strict=True)
        low, high = float(np.min(lows)), float(np.max(highs))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FmpqError(
                f"the input of {site!r} is not finite on the calibration images once the weights are quantized; "
                "allow more bits, or pass activation_bits=None"
            )
        quantizer.freeze(low, high, all(integral))


def _clip_range(descent: RDDescent, site: str, layer: QuantizedLayer, quantizer: ActivationFakeQuant) -> None:
    low, high = quantizer.range

    def clipped(clip: float) -> QuantizedLayer:
        quantizer.freeze(low * clip, high * clip, integral=False)
        return layer

    descent.best_clip(site, clipped, CLIPS)
