"""Histograms of the channels of an input, and the error that rounding to steps would make on them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmpq_fx.ranks import Ranks

Floats = NDArray[np.float64]

OCTAVE = 8
"""Bins in a doubling of the magnitude. The steps of two channels also differ by whole bins."""

ABOVE, BELOW = 4 * OCTAVE, 12 * OCTAVE
"""Bins above and below the largest known magnitude of a channel; values outside count to the last bin."""

PLACES = 4096
"""How many values per channel and image are counted, at most."""


class Histogram:
    """Counts of the values of each channel, by sign and by magnitude in eighths of an octave.

    Args:
        peaks: the largest magnitude known of each channel, (channels,), above 0.
        channel_dim: the channels' dimension of the input, counted from the end (negative).
    """

    def __init__(self, peaks: Floats, channel_dim: int):
        self.channel_dim = channel_dim
        # The lowest bin of each channel; bin n holds magnitudes of n eighths of an octave and more.
        self.first = np.ceil(OCTAVE * np.log2(peaks)).astype(np.int64) - BELOW
        # Counts of negative values in [0], of positive ones in [1].
        self.counts = np.zeros((2, BELOW + ABOVE, len(peaks)), dtype=np.int64)
        self.total = 0  # values counted of each channel, zeros included

    def count(self, x: Tensor) -> None:
        """Count values of ``x``, evenly spaced over each image. NaN counts to the lowest bin."""
        bins, channels = self.counts.shape[1:]
        x = x[None] if x.ndim == -self.channel_dim else x  # a single input
        values = x.detach().movedim(self.channel_dim, -1).reshape(len(x), -1, channels)
        # An odd stride; an even one would see the same columns of every row.
        values = values[:, :: -(-values.size(1) // PLACES) | 1].reshape(-1, channels).float()
        first, channel = torch.as_tensor(self.first).to(x.device), torch.arange(channels, device=x.device)
        found = (OCTAVE * values.abs().log2() - first).nan_to_num(0.0).clamp(0, bins - 1).int()
        places = ((values > 0).int() * bins + found) * channels + channel.int()
        counted = torch.bincount(places[values != 0], minlength=self.counts.size)
        self.counts += counted.view(self.counts.shape).cpu().numpy()
        self.total += len(values)

    def merge(self, ranks: Ranks) -> None:
        """Add the counts of the same histogram on the other ranks."""
        counts, totals = zip(*ranks.gather((self.counts, self.total)), strict=True)
        self.counts, self.total = np.sum(counts, axis=0), sum(totals)

    @property
    def mean_squares(self) -> Floats:
        """The mean square of the values of each channel, (channels,)."""
        return np.asarray((self.counts.sum(0) * self._magnitudes**2).sum(0) / max(self.total, 1))

    def mean_errors(
        self, sides: tuple[float, float], levels: int, power: int, sizes: Sequence[int]
    ) -> Floats:
        """Return the mean squared error of each channel's values for each size of the range, (sizes, channels).

        A value of several steps inside the range has a squared error of step^2 / 12; a value outside has its squared
        distance from the end. Bins and sizes both count eighths of an octave. So the error of a bin depends only on its
        distance from the size, times a power of the size, and one table of errors serves all sizes.

        Args:
            sides: how far the range of size 0 reaches below and above 0.
            levels: the number of steps in a range.
            power: the power of the input that the layer multiplies (2 for GDN, whose gamma multiplies squares).
            sizes: sizes of ranges, in eighths of an octave.
        """
        bins, nearest = len(self.counts[0]), self.first.min() - max(sizes)
        x = _middles(np.arange(nearest, self.first.max() + bins - min(sizes)))  # at size 0
        step = sum(sides) / levels
        small = (x**power - (np.round(x / step) * step) ** power) ** 2
        within = np.where(x < 4 * step, small, step**2 / 12 * power**2 * x ** (2 * power - 2))
        errors = [np.where(x > side, (x**power - side**power) ** 2, within) for side in sides]
        # Row d has the errors of a channel whose first bin lies at distance d.
        rows = [np.lib.stride_tricks.sliding_window_view(of_side, bins) for of_side in errors]
        counted = self.counts.transpose(0, 2, 1).astype(np.float64)
        sums = [
            2.0 ** (2 * power * size / OCTAVE)
            * sum(
                np.einsum("cb,cb->c", counts, of_side[self.first - size - nearest])
                for counts, of_side in zip(counted, rows, strict=True)
            )
            for size in sizes
        ]
        return np.asarray(np.stack(sums) / max(self.total, 1))

    @property
    def _magnitudes(self) -> Floats:
        """The middle of each bin, (bins, channels)."""
        return _middles(np.arange(self.counts.shape[1])[:, None] + self.first)


def _middles(bins: NDArray[np.int64]) -> Floats:
    """Return the magnitude in the middle of each bin."""
    return np.asarray(2.0 ** ((bins + 0.5) / OCTAVE))
