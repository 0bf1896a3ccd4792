"""Choose the range of each channel of an input: the ranges of the least error in the layer's output.

The error of the output has two sources, and both are computed in closed form, without running anything:

- the input. A channel's range trades coarse steps against clipped values (:meth:`Histogram.mean_errors`), and the
  squares of the weights that multiply the channel say how much of its error reaches the output.
- the weights. The channels' sizes r_c are folded into them, so that W_oc r_c is rounded, in steps that the largest of
  these sets. Where sizes differ too much, the weights of the narrow channels are lost.

So ranges lie between one for all channels and each channel's own best::

    size of the range, in eighths of an octave
    one for all       ────────────────────────
    power 0.5         ──.                 .───
                         `──.___.──.___.─'
    each its own      ─.   ,-.      ,-.   .───
                        `-'   `.__.'   `-'
                      channels

and are then all made narrower by the same factor while that lowers the error.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fmpq_fx.passes.clip.histograms import OCTAVE, Floats, Histogram
from fmpq_fx.quant import QuantizedLayer

POWERS = tuple(n / 8 for n in range(9))
"""How far ranges follow the channels' own: with 0, all channels have the range of the widest; with 1, each its own."""

LARGEST = 64
"""How many eighths of an octave the ranges of channels may differ by."""

NARROWER = 32
"""How many eighths of an octave all ranges are made narrower, at most."""


def fit_sizes(
    layer: QuantizedLayer,
    histogram: Histogram,
    widest: int,
    sides: tuple[float, float],
    levels: int,
    powers: Sequence[float] = POWERS,
) -> NDArray[np.int64]:
    """Return the size of each channel's range, (channels,), in eighths of an octave.

    Args:
        layer: the layer whose input it is.
        histogram: the histogram of the input.
        widest: the size that covers all values seen, in eighths of an octave.
        sides: how far the range of size 0 reaches below and above 0.
        levels: the number of steps in a range.
        powers: the :data:`POWERS` that are tried.
    """
    sizes = range(widest, widest - LARGEST - NARROWER, -1)
    weight, quantizer, spread = _weights(layer), layer.weight_quantizer, layer.spread_shape() is not None
    magnitudes, squares = np.abs(weight).max(2), histogram.mean_squares
    errors = histogram.mean_errors(sides, levels, layer.power, sizes) * _energies(layer, weight)
    own = errors[: LARGEST + 1].argmin(0)

    def error_of_weights(factors: Floats) -> float:
        """Return the squared error of all outputs from rounding the weights times ``factors`` of the input channels."""
        steps = (magnitudes * factors).max(1) * quantizer.clip / quantizer.high
        return float((steps**2).sum() / 12 * weight.shape[2] * (squares / factors**2).sum())

    found, least = np.zeros_like(own), np.inf
    for power in powers if spread else (0.0,):
        less = np.round(power * own).astype(np.int64)
        # A factor that all channels share does not change the error of the weights.
        of_weights = error_of_weights(2.0 ** (-less / OCTAVE)) if spread else 0.0
        for narrower in range(NARROWER):
            error = np.take_along_axis(errors, less[None] + narrower, 0).sum() + of_weights
            if error < least:
                found, least = less + narrower, error
    return np.asarray(widest - found)


def _energies(layer: QuantizedLayer, weight: Floats) -> Floats:
    """Return the sum of the squared weights that multiply each input channel, (channels,)."""
    groups = max(1, getattr(layer.layer, "groups", 1))
    return np.asarray((weight**2).sum(2).reshape(groups, -1, weight.shape[1]).sum(1).reshape(-1))


def _weights(layer: QuantizedLayer) -> Floats:
    """Return the float weights, (out, in, places)."""
    return np.asarray(layer.by_output(layer.float_weight().detach()).double().cpu().numpy())
