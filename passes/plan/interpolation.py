"""Estimate zeta where it was not measured, with bounds: log zeta is close to linear in the bits."""

import math
from collections.abc import Iterable, Mapping

PER_BIT = 4.0
"""The factor of zeta for one bit less: steps twice as long have four times the squared error."""


ALIKE = 1.5
"""Nine times in ten, the ratio of zeta at two widths is the same on the first images as on all, within this factor."""


def interpolated(
    measured: Mapping[int, float],
    widths: Iterable[int],
    *,
    bound: int = 0,
    sketch: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Return zeta of one site at all of ``widths``: the measured value, or else an estimate from the nearest widths.

    Between two measured widths log zeta is linear; beyond the last it moves by log(PER_BIT) per bit. A negative
    value counts by its magnitude: it is noise, and other values of the site may have as much. With a sketch, zeta
    changes from the nearest measured width on as the sketch does.

    Args:
        measured: zeta by width; if it is empty, all values are NaN.
        widths: the widths to return zeta at.
        bound: 0 for the likeliest value, -1 or 1 for the least or the most that is expected: off by a factor PER_BIT
            for each bit to the nearest measured width, or by a factor ALIKE with a sketch, and by the noise that the
            measured values show.
        sketch: zeta on a part of the images, by width.
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
    """Return the likeliest magnitude at ``b``, from the nearest measured widths ``below`` and ``above``."""
    if below is None and above is None:
        return math.nan
    if below is None or above is None:
        nearest = above if below is None else below
        assert nearest is not None
        return abs(measured[nearest]) * PER_BIT ** (nearest - b)
    share = (b - below) / (above - below)
    return float(abs(measured[below]) ** (1 - share) * abs(measured[above]) ** share)


def _as_sketched(measured: Mapping[int, float], sketch: Mapping[int, float], b: int) -> float | None:
    """Return the likeliest value at ``b`` by the ``sketch``; None if it has too few values, or misfits."""
    ratios = {m: measured[m] / sketch[m] for m in measured if measured[m] > 0 and sketch.get(m, 0) > 0}
    if not ratios or not sketch.get(b, 0) > 0 or max(ratios.values()) > ALIKE**2 * min(ratios.values()):
        return None
    return sketch[b] * ratios[min(ratios, key=lambda m: abs(m - b))]


def noise_of(measured: Mapping[int, float]) -> float:
    """Return how far measured values fall below zero or rise with the bits; without noise, none does."""
    falls = [-value for value in measured.values()]
    rises = [measured[wide] - measured[b] for b in measured for wide in measured if wide > b]
    return max([0.0, *falls, *rises])
