"""Zeta where it was not measured: log zeta is close to linear in the bits, so neighbours tell it, and how surely."""

import math
from collections.abc import Iterable, Mapping

PER_BIT = 4.0
"""What one bit less makes of zeta: steps twice as long have four times the squared error."""


ALIKE = 1.5
"""By what factor zeta of the first images goes on otherwise from width to width than that of all, nine times in ten."""


def interpolated(
    measured: Mapping[int, float],
    widths: Iterable[int],
    *,
    bound: int = 0,
    sketch: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Return zeta of one site at all of ``widths``: as measured where it was, else from its neighbours.

    Between two measured widths log zeta is linear, beyond the last it moves by log(PER_BIT) per bit. A negative
    value counts by its magnitude: that is noise, and other values of the site may have as much. Where there is a
    sketch, zeta goes on from the nearest measured width as that does.

    Args:
        measured: zeta by width; NaN is returned throughout if there is none.
        widths: what to return zeta at.
        bound: 0 for the likeliest value, -1 or 1 for the least or the most that may be expected: off by PER_BIT for
            each bit to the nearest measured width, or by ALIKE from the sketch, and by the noise that the measured
            values show.
        sketch: zeta of a part of the images, by width.
    """
    noise = bound * noise_of(measured)
    values = {}
    for b in widths:
        if b in measured:
            values[b] = measured[b]
            continue
        if (likely := _as_sketched(measured, sketch or {}, b)) is not None:
            values[b] = likely * ALIKE**bound + noise
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


def _as_sketched(measured: Mapping[int, float], sketch: Mapping[int, float], b: int) -> float | None:
    """Return the likeliest value at ``b`` by the ``sketch``; None where that says nothing, or is off where it does."""
    ratios = {m: measured[m] / sketch[m] for m in measured if measured[m] > 0 and sketch.get(m, 0) > 0}
    if not ratios or not sketch.get(b, 0) > 0 or max(ratios.values()) > ALIKE**2 * min(ratios.values()):
        return None
    return sketch[b] * ratios[min(ratios, key=lambda m: abs(m - b))]


def noise_of(measured: Mapping[int, float]) -> float:
    """Return by how much measured values fall below zero or rise with the bits, which without noise none does."""
    falls = [-value for value in measured.values()]
    rises = [measured[wide] - measured[b] for b in measured for wide in measured if wide > b]
    return max([0.0, *falls, *rises])
