"""Choose the first weight scales: min-max, or clipped where that gives a lower RD loss.

Clipping outliers buys finer steps for everything else, which at few bits is a good trade. The squared error of
the weights does not tell when: scales of least squared error start worse than min-max. So RD loss decides, one
site after the other in the order of the graph, each with all others quantized as they stand.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, fx

from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.clip.descent import RDDescent
from fmpq_fx.passes.rewrite import activations_float
from fmpq_fx.progress import reported
from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_layers

CLIPS = (0.9, 0.8, 0.7, 0.6)
"""Parts of a channel's largest magnitude that are tried as the end of its range, until one is no better."""

WORTHWHILE = 5e-4
"""Zeta below which a site is left at min-max: there is next to nothing to gain."""


def choose_scales(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    *,
    memory: int | None = None,
    progress: bool | None = None,
) -> float:
    """Give each site of ``gm`` the weight scales that lower the RD loss on ``batches``, with activations float.

    Args:
        gm: a rewritten graph in evaluation mode whose activations are not calibrated yet. It is changed, and the
            choice is written into its plan. The RD loss on ``batches`` never rises by it.
        batches: calibration images, (B, 3, H, W) each, in [0, 1].
        memory: bytes of activations to keep at most, see :class:`ChangeMeter`.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Returns:
        that RD loss, as it is afterwards.
    """
    plan = plan_of(gm)
    # "not <": sites that were given bits for which zeta was not measured have NaN, and are tried as well.
    layers = {site: m for site, m in quantized_layers(gm).items() if not plan.zeta_of(site) < WORTHWHILE}
    clips: dict[str, float] = {}
    with activations_float(gm), RDDescent(gm, batches, plan.lmbda, list(layers), memory=memory) as descent:
        for site, layer in reported(layers.items(), "weight scales", "site", show=progress):
            clips[site] = descent.best_clip(site, partial(_clipped, layer), CLIPS)
        rd = descent.rd
    clips = {site: clip for site, clip in clips.items() if clip < 1}
    chosen = quantized_layers(gm)
    for site in clips:  # another layer stands there now, which was made without a quantizer of its input
        chosen[site].input_quantizer = layers[site].input_quantizer
    annotate_graph(gm, plan=replace(plan, clips=clips))
    return rd


def _clipped(layer: QuantizedLayer, clip: float) -> QuantizedLayer:
    return quantize_layer(layer.layer, layer.bits, clip=clip).train(layer.training)
