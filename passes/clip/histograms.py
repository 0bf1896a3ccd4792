"""How the values of each channel of an input are distributed, and how far off rounding them to steps would be."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmpq_fx.ranks import Ranks

Floats = NDArray[np.float64]

OCTAVE = 8
"""Bins in a doubling of the magnitude. The steps of channels differ by whole bins as well."""

ABOVE, BELOW = 4 * OCTAVE, 12 * OCTAVE
"""Bins above and below the largest magnitude that is known of a channel; values outside count to the last."""

PLACES = 4096
"""How many values of a channel are counted of an image, at most."""


class Histogram:
    """Counts of the values of each channel, by sign and by magnitude in eighths of an octave.

    Args:
        peaks: the largest magnitude known of each channel, (channels,), above 0.
        channel_dim: of the input, counted from its end.
    """

    def __init__(self, peaks: Floats, channel_dim: int):
        self.channel_dim = channel_dim
        # The lowest bin of each channel; bin n holds magnitudes of n eighths of an octave and more.
        self.first = np.ceil(OCTAVE * np.log2(peaks)).astype(np.int64) - BELOW
        self.counts = np.zeros((2, BELOW + ABOVE, len(peaks)), dtype=np.int64)  # of values below and above 0
        self.total = 0  # of each channel, zeros included

    def count(self, x: Tensor) -> None:
        """Count values of ``x``, evenly spaced over each image. What is not a number counts to the lowest bin."""
        bins, channels = self.counts.shape[1:]
        x = x[None] if x.ndim == -self.channel_dim else x  # a single input
        values = x.detach().movedim(self.channel_dim, -1).reshape(len(x), -1, channels)
        # An odd stride, or it would see the same columns of every row.
        values = values[:, :: -(-values.size(1) // PLACES) | 1].reshape(-1, channels).float()
        first, channel = torch.as_tensor(self.first).to(x.device), torch.arange(channels, device=x.device)
        found = (OCTAVE * values.abs().log2() - first).nan_to_num(0.0).clamp(0, bins - 1).int()
        places = ((values > 0).int() * bins + found) * channels + channel.int()
        counted = torch.bincount(places[values != 0], minlength=self.counts.size)
        self.counts += counted.view(self.counts.shape).cpu().numpy()
        self.total += len(values)

    def merge(self, ranks: Ranks) -> None:
        """Take in what the histograms of the other ranks have counted."""
        counts, totals = zip(*ranks.gather((self.counts, self.total)), strict=True)
        self.counts, self.total = np.sum(counts, axis=0), sum(totals)

    @property
    def mean_squares(self) -> Floats:
        """Of the values of each channel, (channels,)."""
        return np.asarray((self.counts.sum(0) * self._magnitudes**2).sum(0) / max(self.total, 1))

    def mean_errors(
        self, sides: tuple[float, float], levels: int, power: int, sizes: Sequence[int]
    ) -> Floats:
        """Return the mean squared error of each channel's values by the size of the range, (sizes, channels).

        A value within the range is off by a twelfth of the squared step, if it is some steps large; outside, by its
        distance from the end. Bins and sizes are eighths of an octave both, so that a bin is off by what its distance
        from the size says, times a power of the size.

        Args:
            sides: how far the range of size 0 reaches below and above 0.
            levels: how many steps there are in a range.
            power: of the value, to which the layer multiplies it.
            sizes: of ranges, in eighths of an octave.
        """
        bins, nearest = len(self.counts[0]), self.first.min() - max(sizes)
        x = _middles(np.arange(nearest, self.first.max() + bins - min(sizes)))  # where the size is 0
        step = sum(sides) / levels
        small = (x**power - (np.round(x / step) * step) ** power) ** 2
        within = np.where(x < 4 * step, small, step**2 / 12 * power**2 * x ** (2 * power - 2))
        errors = [np.where(x > side, (x**power - side**power) ** 2, within) for side in sides]
        # From each distance on, the errors of as many bins as a channel has.
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
    """Return the magnitudes in the middle of bins."""
    return np.asarray(2.0 ** ((bins + 0.5) / OCTAVE))
