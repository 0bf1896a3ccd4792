"""Measure the error of each layer's output at each setting that the layer may have, for all layers in one run."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.quant import quantized_layers
from fmpq_fx.rd import squared_error

Setter = Callable[[float], None]
"""A function that sets a layer of the graph, in place: to the fraction of its range at which it clips, for example."""

FAR = 2.0
"""Once the error is this many times that of the first setting, the settings after it are not tried."""


@torch.no_grad()
def output_errors(
    gm: fx.GraphModule, x: Tensor, setters: Mapping[str, Setter], settings: Sequence[float]
) -> dict[str, list[float]]:
    """Return, for each site that is called in a run of ``gm``, the squared error of its output at each of ``settings``.

    The output is compared with that of the float layer on the same input; all other sites have their first settings.
    The error is infinite at settings that are not tried, because an earlier one is far worse than the first.

    Args:
        gm: a rewritten graph in evaluation mode.
        x: images (B, C, H, W) in [0, 1].
        setters: the function that changes each site.
        settings: the setting that each site has now, then the others.
    """
    layers, errors = quantized_layers(gm), {}
    with ExitStack() as hooks:
        for site, set_one in setters.items():
            errors[site] = [0.0] * len(settings)
            compare = partial(_add_errors, errors[site], set_one, settings)
            hooks.callback(layers[site].register_forward_hook(compare).remove)
        output_of(gm, x)
    return {site: sums for site, sums in errors.items() if any(sums)}


def _add_errors(
    sums: list[float],
    set_one: Setter,
    settings: Sequence[float],
    layer: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> None:
    """Add to ``sums`` the squared errors of the layer at ``settings``; before and after, it has the first setting."""
    exact = layer.layer(*inputs)  # type: ignore[operator]
    sums[0] += squared_error(output, exact).item()
    for number, setting in enumerate(settings[1:], start=1):
        set_one(setting)
        sums[number] += squared_error(layer.forward(*inputs), exact).item()
        if sums[number] > FAR * sums[0]:
            sums[number + 1 :] = [math.inf] * (len(sums) - number - 1)
            break
    set_one(settings[0])
