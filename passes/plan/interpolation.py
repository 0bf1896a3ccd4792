"""Zeta where it was not measured: log zeta is close to linear in the bits, so neighbours tell it, and how surely."""

import math
from collections.abc import Iterable, Mapping

PER_BIT = 4.0
"""What one bit less makes of zeta: steps twice as long have four times the squared error."""


def interpolated(measured: Mapping[int, float], widths: Iterable[int], *, bound: int = 0) -> dict[int, float]:
    """Return zeta of one site at all of ``widths``: as measured where it was, else from its neighbours.

    Between two measured widths log zeta is linear, beyond the last it moves by log(PER_BIT) per bit. A negative
    value counts by its magnitude: that is noise, and other values of the site may have as much.

    Args:
        measured: zeta by width; NaN is returned throughout if there is none.
        widths: what to return zeta at.
        bound: 0 for the likeliest value, -1 or 1 for the least or the most that may be expected: off by PER_BIT for
            each bit to the nearest measured width, and by the noise that the measured values show.
    """
    noise = bound * noise_of(measured)
    values = {}
    for b in widths:
        if b in measured:
            values[b] = measured[b]
            continue
        below = max((m for m in measured if m < b), default=None)
        above = min((m for m in measured if m > b), default=None)
        distance = min(abs(b - m) for m in (below, above) if m is not None) if measured else 0
        values[b] = _between(measured, below, above, b) * PER_BIT ** (bound * distance) + noise
    return values


def _between(measured: Mapping[int, float], below: int | None, above: int | None, b: int) -> float:
    """Return the likeliest magnitude at ``b``, between the nearest measured widths on either side."""
    if below is None and above is None:
        return math.nan
    if below is None or above is None:
        nearest = above if below is None else below
        assert nearest is not None
        return abs(measured[nearest]) * PER_BIT ** (nearest - b)
    share = (b - below) / (above - below)
    return float(abs(measured[below]) ** (1 - share) * abs(measured[above]) ** share)


def noise_of(measured: Mapping[int, float]) -> float:
    """Return by how much measured values fall below zero or rise with the bits, which without noise none does."""
    falls = [-value for value in measured.values()]
    rises = [measured[wide] - measured[b] for b in measured for wide in measured if wide > b]
    return max([0.0, *falls, *rises])
