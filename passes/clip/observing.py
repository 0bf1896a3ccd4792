"""Observe the inputs of layers: the least and largest value of each channel, and a histogram of its values."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.clip.histograms import Floats, Histogram
from fmpq_fx.passes.measure.bench import Bench, cut_into_pieces, run_fast
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.progress import reported
from fmpq_fx.quant import ActivationFakeQuant, QuantizedLayer, weights_kept

_NOTHING_SEEN = np.zeros(1), np.zeros(1), True


@dataclass(frozen=True)
class Seen:
    """The extremes that were seen of an input."""

    lows: Floats  # the least value of each channel, at most 0; (channels,)
    highs: Floats  # the largest value of each channel, at least 0; (channels,)
    integral: bool  # whether all values were whole numbers

    @property
    def peaks(self) -> Floats:
        """The largest magnitude of each channel, (channels,). A channel that was always 0 gets the largest of all."""
        peaks = np.maximum(-self.lows, self.highs)
        return np.where(peaks > 0, peaks, peaks.max() or 1.0)


def observe(
    gm: fx.GraphModule, bench: Bench, watched: Sequence[Tensor], layers: Mapping[str, QuantizedLayer]
) -> dict[str, tuple[Seen, Histogram]]:
    """Return the extremes and the histogram of the input of each of ``layers``, while no input is rounded.

    Args:
        gm: a rewritten graph in evaluation mode.
        bench: images, and the ranks that share them.
        watched: more images, (B, C, H, W).
        layers: the layers, by site; all have a quantizer of their input.

    Raises:
        FmpqError: an input is not finite.
    """
    for quantizer in _quantizers(layers):
        quantizer.observe()  # forgets earlier runs, perhaps with other weights
    _watch(gm, bench.ranks.share(bench.pieces))
    histograms = {
        site: Histogram(seen.peaks, layers[site].channel_dim) for site, seen in _seen(bench, layers).items()
    }
    with ExitStack() as hooks:
        for site, histogram in histograms.items():
            hooks.callback(layers[site].register_forward_pre_hook(partial(_count, histogram)).remove)
        more = [x.contiguous(memory_format=bench.layout) for x in cut_into_pieces(watched)]
        pieces = bench.ranks.share([*bench.pieces, *more])
        _watch(gm, reported(pieces, "activation ranges", "piece", show=bench.progress))
    for histogram in histograms.values():
        histogram.merge(bench.ranks)
    return {site: (seen, histograms[site]) for site, seen in _seen(bench, layers).items()}


def _quantizers(layers: Mapping[str, QuantizedLayer]) -> list[ActivationFakeQuant]:
    return [layer.input_quantizer for layer in layers.values() if layer.input_quantizer is not None]


def _count(histogram: Histogram, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    histogram.count(inputs[0])


def _watch(gm: fx.GraphModule, pieces: Iterable[Tensor]) -> None:
    with run_fast(gm), weights_kept(gm):
        for x in pieces:
            output_of(gm, x)


def _seen(bench: Bench, layers: Mapping[str, QuantizedLayer]) -> dict[str, Seen]:
    """Return the extremes that the inputs' observers saw until now, on all ranks."""
    of_ranks = bench.ranks.gather([_ends(quantizer) for quantizer in _quantizers(layers)])
    result = {}
    for site, seen in zip(layers, zip(*of_ranks, strict=True), strict=True):
        lows, highs, integral = zip(*(ends or _NOTHING_SEEN for ends in seen), strict=True)
        low = np.minimum.reduce(np.broadcast_arrays(*lows))
        high = np.maximum.reduce(np.broadcast_arrays(*highs))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise FmpqError(
                f"the input of {site!r} is not finite on the calibration images once the weights are quantized; "
                "allow more bits, or pass activation_bits=None"
            )
        result[site] = Seen(low, high, all(integral))
    return result


def _ends(quantizer: ActivationFakeQuant) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Return the least and the largest value of each channel, and whether all were whole; None if nothing was seen."""
    if quantizer.seen is None:
        return None
    low, high = (ends.double().cpu().numpy() for ends in quantizer.seen)
    return low, high, quantizer.integral
