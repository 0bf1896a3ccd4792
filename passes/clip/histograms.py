"""How the values of each channel of an input are distributed, and how far off rounding them to steps would be."""

from collections.abc import Iterable

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
        self, sides: tuple[float, float], levels: int, power: int, sizes: Iterable[int]
    ) -> Floats:
        """Return the mean squared error of each channel's values by the size of the range, (sizes, channels).

        A value within the range is off by a twelfth of the squared step, if it is some steps large; outside, by its
        distance from the end.

        Args:
            sides: how far the range of size 0 reaches below and above 0.
            levels: how many steps there are in a range.
            power: of the value, to which the layer multiplies it.
            sizes: of ranges, in eighths of an octave.
        """
        x = self._magnitudes
        result = []
        for size in sizes:
            end = 2.0 ** (size / OCTAVE)
            step = sum(sides) * end / levels
            small = (x**power - (np.round(x / step) * step) ** power) ** 2
            within = np.where(x < 4 * step, small, step**2 / 12 * power**2 * x ** (2 * power - 2))
            sums = 0.0
            for counts, side in zip(self.counts, sides, strict=True):
                outside = (x**power - (side * end) ** power) ** 2
                sums = sums + (counts * np.where(x > side * end, outside, within)).sum(0)
            result.append(sums)
        return np.stack(result) / max(self.total, 1)

    @property
    def _magnitudes(self) -> Floats:
        """The middle of each bin, (bins, channels)."""
        bins = np.arange(self.counts.shape[1])[:, None] + self.first
        return np.asarray(2.0 ** ((bins + 0.5) / OCTAVE))
