"""The rounding of the inputs of sites, as plans record it."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InputGrid:
    """The range and the steps of a site's input, as calibrated.

    With a ``spread``, the range is that of the widest channel, and channel c has its range and its step times
    2^(-spread[c] / 8).
    """

    low: float  # at most 0
    high: float  # at least 0
    whole: bool = False  # the input is whole numbers, and its step is 1
    spread: tuple[int, ...] = ()  # per channel, in eighths of an octave; (): one step for all

    @property
    def log_spread(self) -> list[float]:
        """The logarithms of the channels' factors."""
        return [-eighths / 8 * math.log(2) for eighths in self.spread]


def products_at(bits: int | None, activation_bits: int | None) -> int:
    """Return how many products of 8-bit integers one product takes, of a weight and an input of so many bits."""
    return math.prod(1 if width is None or width <= 8 else 2 for width in (bits, activation_bits))


def grids_in(fields: dict[str, Any]) -> dict[str, InputGrid]:
    """Take the grids of the inputs out of ``fields``; older plans have the fields "ranges" and "integral" instead."""
    if "ranges" in fields:
        ranges, integral = fields.pop("ranges"), fields.pop("integral")
        return {s: InputGrid(float(low), float(high), s in integral) for s, (low, high) in ranges.items()}
    return {
        site: InputGrid(**{**grid, "spread": tuple(map(int, grid["spread"]))})
        for site, grid in fields["inputs"].items()
    }
