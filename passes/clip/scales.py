"""Choose the first weight scales: min-max, or clipped where that gives a lower RD loss.

Clipping outliers buys finer steps for everything else, which at few bits is a good trade. The squared error of
the weights does not tell when: scales of least squared error start worse than min-max. So RD loss decides, one
site after the other in the order of the graph, each with all others quantized as they stand.
"""

from dataclasses import replace

from torch import fx

from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.clip.descent import choose
from fmpq_fx.passes.measure.bench import Bench
from fmpq_fx.passes.rewrite import activations_float
from fmpq_fx.quant import quantized_layers

CLIPS = (0.9, 0.8, 0.7, 0.6)
"""Fractions of a channel's largest magnitude that are tried as the end of its range."""

WORTHWHILE = 5e-4
"""Zeta below which a site is left at min-max: there is next to nothing to gain."""


def choose_scales(gm: fx.GraphModule, bench: Bench) -> None:
    """Give each site of ``gm`` the weight scales that lower the RD loss on ``bench``, with activations float.

    Args:
        gm: a rewritten graph in evaluation mode, with min-max scales. It is changed, and the choice is written into
            its plan. The RD loss on ``bench`` never rises.
        bench: the images and the distortion of the RD loss.
    """
    plan = plan_of(gm)
    # "not <": zeta is NaN at fixed bits that were not measured; such sites are tried as well.
    layers = {site: m for site, m in quantized_layers(gm).items() if not plan.zeta_of(site) < WORTHWHILE}
    setters = {site: layer.set_clip for site, layer in layers.items()}
    with activations_float(gm):
        chosen, _ = choose(gm, bench, plan.lmbda, setters, (1.0, *CLIPS), "weight scales")
    annotate_graph(gm, plan=replace(plan, clips={site: clip for site, clip in chosen.items() if clip < 1}))
