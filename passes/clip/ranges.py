"""Set how inputs are rounded: observers see the calibration images and become fake-quantizers.

At first every input has one step for all its channels, which covers what was seen. Where that costs RD loss, three
things are chosen by it, in this order:

- the *spread* of the steps over the channels. Step c is in proportion to (largest magnitude of channel c)^power, and is
  folded into the weights. Behind a GDN, channels differ by up to 50 times, and one step for all is coarse for most.
- the *clip*, how much of the range is kept: a few large values, which clipping hardly hurts, would make the steps of
  all others coarse.
- the *bits*, 16 instead of 8 where that saves the most, as far as a budget of products allows.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.clip.descent import choose
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.measure.bench import Bench, mean_rd
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.passes.measure.coded_sizes import coded_size
from fmpq_fx.passes.plan.activations import wide_inputs
from fmpq_fx.passes.plan.inputs import InputGrid, products_at
from fmpq_fx.passes.plan.tables import Plan, Table
from fmpq_fx.passes.plan.widths import WIDE
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.quant import ActivationFakeQuant, QuantizedLayer, quantized_layers, weights_kept

POWERS = (0.0, 0.25, 0.5, 0.75)
"""Powers of the spread that are tried; 0 is one step for all channels.

With 1, every channel would end where its own range on the calibration does, which other images exceed: below it, the
smaller a channel is, the more room it has."""

CLIPS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3)
"""Parts of the range that are tried."""

NEGLIGIBLE = 1e-4
"""What rounding an input may cost, in fractions of the RD loss of the first images, without anything being tried to
lower it."""

_NOTHING_SEEN = np.zeros(1), np.zeros(1), True
_MOST_EIGHTHS = 64  # of an octave, by which steps of channels may differ


def calibrate(gm: fx.GraphModule, bench: Bench, mixed: tuple[str, ...] = (), budget: float = 0.0) -> float:
    """Say how the inputs of ``gm`` are rounded, from the images of ``bench``.

    Args:
        gm: a rewritten graph in evaluation mode. It is changed, and what is chosen is written into its plan. Layers
            that are calibrated already stay as they are.
        bench: what is observed, and what the RD loss is measured on.
        mixed: the sites whose inputs may get 16 bits.
        budget: how many more products these may take, as a fraction of those with 8 bits.

    Returns:
        the RD loss of ``gm`` afterwards.

    Raises:
        FmpqError: an input is not finite. (Where the RD loss is not, that is returned.)
    """
    plan = plan_of(gm)
    layers = {
        site: layer
        for site, layer in quantized_layers(gm).items()
        if layer.input_quantizer is not None and layer.input_quantizer.observing
    }
    if not layers:
        return mean_rd(gm, bench, plan.lmbda)
    inputs = _observed(gm, bench, layers)
    if not math.isfinite(rd := mean_rd(gm, bench, plan.lmbda)):
        return rd  # there is nothing to choose by
    macs = _multiply_accumulates(gm, bench)
    first = _zeta_of_inputs(gm, replace(bench, pieces=bench.pieces[:1]), inputs)
    open_sites = {site: inputs[site] for site, zeta in first.items() if not zeta <= NEGLIGIBLE}
    graded = {site: one for site, one in open_sites.items() if not one.integral}
    set_power = {s: partial(one.set, "power") for s, one in graded.items() if one.layer.spread_shape()}
    set_clip = {site: partial(one.set, "clip") for site, one in graded.items()}
    if set_power:
        choose(gm, bench, plan.lmbda, set_power, POWERS, "activation steps")
    if set_clip:
        _, rd = choose(gm, bench, plan.lmbda, set_clip, CLIPS, "activation ranges")

    products = {site: macs[site] * products_at(plan.bits[site], one.bits) for site, one in inputs.items()}
    candidates = {site: one for site, one in open_sites.items() if site in mixed}
    spare = budget * math.fsum(products.values())
    wide = wide_inputs(_zeta_of_inputs(gm, bench, candidates), products, spare) if candidates else ()
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
    """The input of a layer while it is chosen how to round it."""

    def __init__(self, layer: QuantizedLayer, lows: np.ndarray, highs: np.ndarray, integral: bool):
        self.layer, self.lows, self.highs, self.integral = layer, lows, highs, integral
        self.bits = self._quantizer.bits
        self.power, self.clip = 0.0, 1.0
        self._apply()

    def set(self, name: str, value: float) -> None:
        """Set ``power`` or ``clip``."""
        setattr(self, name, value)
        self._apply()

    def widen(self) -> None:
        """Round to 16 bits, which cover what was seen in one step."""
        self.bits, self.power, self.clip = WIDE, 0.0, 1.0
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
        """What the integers cover."""
        peaks = np.maximum(-self.lows, self.highs)
        # A channel that is zero on the calibration says nothing about its range: it gets the widest.
        ratios = np.divide(peaks.max(), peaks, where=peaks > 0, out=np.ones_like(peaks))
        octaves = np.log2(ratios)
        eighths = np.round(8 * self.power * octaves).clip(max=_MOST_EIGHTHS).astype(int)
        factors = 2.0 ** (-eighths / 8)
        low, high = (self.lows / factors).min(), (self.highs / factors).max()
        spread = tuple(eighths.tolist()) if eighths.any() else ()
        return InputGrid(float(low * self.clip), float(high * self.clip), self.integral, spread)

    def _apply(self) -> None:
        grid = self.grid
        self.layer.set_spread(grid.log_spread)
        self._quantizer.set_bits(self.bits)
        self._quantizer.freeze(grid.low, grid.high, grid.whole)

    @property
    def _quantizer(self) -> ActivationFakeQuant:
        quantizer = self.layer.input_quantizer
        assert quantizer is not None
        return quantizer


def _observed(gm: fx.GraphModule, bench: Bench, layers: Mapping[str, QuantizedLayer]) -> dict[str, _Input]:
    """Freeze the quantizers of the inputs of ``layers`` at what is seen of them."""
    quantizers = [layer.input_quantizer for layer in layers.values() if layer.input_quantizer is not None]
    for quantizer in quantizers:
        quantizer.observe()  # what was run before this, with other weights perhaps, does not count
    with torch.no_grad(), weights_kept(gm), freed_memory_kept():
        for x in bench.ranks.share(bench.pieces):
            output_of(gm, x)
    seen = bench.ranks.gather([_ends(quantizer) for quantizer in quantizers])
    inputs = {}
    for (site, layer), of_ranks in zip(layers.items(), zip(*seen, strict=True), strict=True):
        lows, highs, integral = zip(*(ends or _NOTHING_SEEN for ends in of_ranks), strict=True)
        low = np.minimum.reduce(np.broadcast_arrays(*lows))
        high = np.maximum.reduce(np.broadcast_arrays(*highs))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise FmpqError(
                f"the input of {site!r} is not finite on the calibration images once the weights are quantized; "
                "allow more bits, or pass activation_bits=None"
            )
        inputs[site] = _Input(layer, low, high, all(integral))
    return inputs


def _ends(quantizer: ActivationFakeQuant) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Return the least and the largest value of each channel seen, and whether all were whole; None if none was."""
    if quantizer.seen is None:
        return None
    low, high = (ends.double().cpu().numpy() for ends in quantizer.seen)
    return low, high, quantizer.integral


def _zeta_of_inputs(gm: fx.GraphModule, bench: Bench, inputs: Mapping[str, _Input]) -> dict[str, float]:
    """Return what it costs, in fractions of the RD loss, that each input is rounded as it is and not to 16 bits."""
    lmbda, meter = plan_of(gm).lmbda, ChangeMeter(gm, bench)
    sums = meter.measure({site: (site, one.widened) for site, one in inputs.items()}, "activation bits")
    rd = meter.measure_base().rd(lmbda)
    return {site: (rd - widened.rd(lmbda)) / rd for site, widened in sums.items()}


def _coded(plan: Plan, inputs: Mapping[str, _Input]) -> Table | None:
    """Return the coded bytes of the plan with the weights as they are now; a spread that costs bytes is taken back."""
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
                one.set("power", 0.0)
    return coded


def _multiply_accumulates(gm: fx.GraphModule, bench: Bench) -> dict[str, float]:
    """Return the multiply-accumulates of each site per pixel of an image."""
    x = bench.pieces[0][:1]
    with torch.no_grad(), weights_kept(gm), FlopCounterMode(display=False) as counter:
        output_of(gm, x)
    # By qualified name behind that of the class; of each multiplication and addition one is counted.
    flops = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    return {site: flops.get(site, 0) / 2 / (x.size(-1) * x.size(-2)) for site in plan_of(gm).bits}
