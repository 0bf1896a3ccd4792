"""Choose the rounding of inputs: observers see the calibration images and become fake-quantizers.

Each channel gets the range with the least error in the layer's output (:mod:`fmpq_fx.passes.clip.steps`); the steps of
channels differ, and are folded into the weights. Then inputs get 16 bits instead of 8 where that saves the most RD
loss, within a budget of products.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx, nn

from fmpq_fx.passes.annotation import annotate_graph, note_of, plan_of
from fmpq_fx.passes.clip.histograms import OCTAVE, Histogram
from fmpq_fx.passes.clip.observing import Seen, observe
from fmpq_fx.passes.clip.steps import POWERS, fit_sizes
from fmpq_fx.passes.clip.wide import find_wide
from fmpq_fx.passes.measure.bench import Bench, mean_rd
from fmpq_fx.passes.measure.coded_sizes import coded_size
from fmpq_fx.passes.plan.inputs import InputGrid, products_at
from fmpq_fx.passes.plan.tables import Plan, Table
from fmpq_fx.passes.plan.widths import WIDE
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.quant import (
    ActivationFakeQuant,
    QuantizedLayer,
    quantized_class,
    quantized_layers,
    weights_kept,
)
from fmpq_fx.quant.layers import QuantizedConvTranspose2d

ROOM, ROOM_OF_16_BITS = 1, OCTAVE
"""Eighths of an octave by which ranges of 8 bits, and of 16 bits, are wider than the calibration images need, because
other images exceed them. Ranges of 16 bits have steps to spare."""


def calibrate(
    gm: fx.GraphModule,
    bench: Bench,
    mixed: tuple[str, ...] = (),
    budget: float = 0.0,
    *,
    watched: Sequence[Tensor] = (),
) -> float:
    """Choose the bits, ranges and steps of the inputs of ``gm``, from the images of ``bench``.

    Args:
        gm: a rewritten graph in evaluation mode. It is changed, and the choice is written into its plan. Layers that
            are calibrated already stay as they are.
        bench: the images that inputs are observed on, and the RD loss is measured on.
        mixed: the sites whose inputs may get 16 bits.
        budget: how many products these may add, as a fraction of the products with 8 bits.
        watched: more images (B, C, H, W) to observe inputs on. Eight crops tell the zeta of a layer, but not how large
            its inputs get.

    Returns:
        the RD loss of ``gm`` afterwards.

    Raises:
        FmpqError: an input is not finite. (An RD loss that is not finite is returned.)
    """
    plan = plan_of(gm)
    layers = {
        site: layer
        for site, layer in quantized_layers(gm).items()
        if layer.input_quantizer is not None and layer.input_quantizer.observing
    }
    if not layers:
        return mean_rd(gm, bench, plan.lmbda)
    macs = _multiply_accumulates(gm, bench)
    images = _sites_of_images(gm)
    inputs = {
        site: _Input(layers[site], *seen, images=site in images)
        for site, seen in observe(gm, bench, watched, layers).items()
    }
    if not math.isfinite(rd := mean_rd(gm, bench, plan.lmbda)):
        return rd  # there is nothing to choose by
    products = {site: macs[site] * products_at(plan.bits[site], one.bits) for site, one in inputs.items()}
    candidates = {site: one.widened for site, one in inputs.items() if site in mixed and not one.integral}
    most = budget * math.fsum(products.values())
    wide = find_wide(gm, bench, candidates, products, most)
    for site in wide:
        inputs[site].widen()
    coded = _coded(plan, inputs)
    annotate_graph(
        gm,
        plan=replace(
            plan,
            activation_bits={**plan.activation_bits, **{site: one.bits for site, one in inputs.items()}},
            inputs={**plan.inputs, **{site: one.grid for site, one in inputs.items()}},
            macs=macs,
            coded=coded,
        ),
    )
    return rd if not wide and coded is None else mean_rd(gm, bench, plan.lmbda)


class _Input:
    """The input of a layer, while its rounding is being chosen.

    Args:
        layer: the layer whose input it is.
        seen: the extremes of the input.
        histogram: the histogram of the input.
        images: whether the input is the images themselves, whose range is 0 … 1: 8 bits are then exact.
    """

    def __init__(self, layer: QuantizedLayer, seen: Seen, histogram: Histogram, *, images: bool):
        self.layer, self.integral, self._histogram, self._images = layer, seen.integral, histogram, images
        self.bits = self._quantizer.bits
        peaks = seen.peaks
        self._low, self._high = float(seen.lows.min()), float(seen.highs.max())
        self._sides = float((-seen.lows / peaks).max()), float((seen.highs / peaks).max())
        self._widest = math.ceil(OCTAVE * math.log2(peaks.max()))
        self._sizes = np.full(len(peaks), self._widest)
        self.fit()

    def fit(self, powers: Sequence[float] = POWERS) -> None:
        """Choose the ranges of the channels; see :func:`fit_sizes`."""
        if not (self.integral or self._images):
            levels = self._quantizer.high
            fitted = fit_sizes(self.layer, self._histogram, self._widest, self._sides, levels, powers)
            self._sizes = ROOM + fitted
        self._apply()

    def widen(self) -> None:
        """Round to 16 bits, with one step for all channels and a range wider than was seen."""
        self.bits = WIDE
        self._sizes = np.full_like(self._sizes, self._widest + ROOM_OF_16_BITS)
        self._apply()

    def widened(self, layer: nn.Module) -> nn.Module:
        """Return a copy of ``layer`` whose input is rounded to 16 bits; the layer stays as it is."""
        other = copy.copy(self)
        assert isinstance(layer, QuantizedLayer)
        other.layer = copy.deepcopy(layer)
        other.widen()
        return other.layer

    @property
    def grid(self) -> InputGrid:
        """The range and the steps of the input's integers."""
        if self.integral:
            return InputGrid(self._low, self._high, True)
        if self._images:
            return InputGrid(0.0, 1.0)
        eighths = self._sizes.max() - self._sizes
        end = 2.0 ** (int(self._sizes.max()) / OCTAVE)
        below, above = self._sides
        return InputGrid(-below * end, above * end, False, tuple(eighths.tolist()) if eighths.any() else ())

    def _apply(self) -> None:
        grid, quantizer = self.grid, self._quantizer
        self.layer.set_spread(grid.log_spread)
        quantizer.set_bits(self.bits)
        quantizer.freeze(grid.low, grid.high, grid.whole)

    @property
    def _quantizer(self) -> ActivationFakeQuant:
        quantizer = self.layer.input_quantizer
        assert quantizer is not None
        return quantizer


def _sites_of_images(gm: fx.GraphModule) -> set[str]:
    """Return the sites whose input is always the images that the model takes, wherever they are called."""
    calls: dict[str, list[bool]] = {}
    for node in gm.graph.nodes:
        for site in note_of(node).sites:
            itself = node.op == "call_module" and gm.get_submodule(node.target) is gm.get_submodule(site)
            images = [isinstance(x, fx.Node) and x.op == "placeholder" for x in node.args[:1]]
            calls.setdefault(site, []).append(itself and images == [True])
    return {site for site, of_images in calls.items() if all(of_images)}


def _coded(plan: Plan, inputs: Mapping[str, _Input]) -> Table | None:
    """Return the coded bytes of the plan with the present weights; an input spread that costs bytes is taken back."""
    if plan.coded is None:
        return None
    coded = dict(plan.coded)
    for site, one in inputs.items():
        bits = plan.bits[site]
        if one.grid.spread and bits is not None:
            size = coded_size(one.layer)  # mostly less: the weights of narrow channels become small integers
            if size <= coded[site][bits]:
                coded[site] = {**coded[site], bits: size}
            else:
                one.fit((0.0,))
    return coded


def _multiply_accumulates(gm: fx.GraphModule, bench: Bench) -> dict[str, float]:
    """Return the multiply-accumulates of each site per pixel of an image."""
    x = bench.pieces[0][:1]
    counts = dict.fromkeys(plan_of(gm).bits, 0.0)

    def add(
        _: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        out: Tensor,
        *,
        site: str,
        kind: type[QuantizedLayer],
        weights: int,
    ) -> None:
        # A convolution multiplies all its weights at each place of its output, a transposed one of its input.
        places = (*args, *kwargs.values())[0] if issubclass(kind, QuantizedConvTranspose2d) else out
        counts[site] += weights * places.numel() / places.size(kind.channel_dim)

    with ExitStack() as stack, torch.no_grad(), weights_kept(gm):
        for site in counts:
            layer = gm.get_submodule(site)
            inner = layer.layer if isinstance(layer, QuantizedLayer) else layer
            kind = quantized_class(inner)
            assert kind is not None  # it is a site
            hook = partial(add, site=site, kind=kind, weights=kind.weight_of(inner).numel())
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        output_of(gm, x)
    return {site: count / (x.size(-1) * x.size(-2)) for site, count in counts.items()}
