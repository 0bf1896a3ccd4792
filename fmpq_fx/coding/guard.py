"""Choose CDFs so that slightly different floats choose the same ones, with a few bytes in the file.

CompressAI's ``build_indexes`` compares every scale with a table. Another machine computes scales that differ in their
last places. If a scale lies at a boundary of the table, that machine may choose another CDF, and everything decoded
after that is noise. So positions are divided into blocks, and all scales of a block are multiplied by the first of
some factors close to 1 with which none of them lies within the margin of a boundary::

    boundaries of the table         |            |             |
    scales of a block              ·|  ·     ·   |    ·   ·    |         one is too close
    the same, times 1 + 1 shift     |·   ·     · |      ·    · |         another one is
    the same, times 1 + 2 shifts    | ·   ·      | ·     ·    ·|·        none is: the file says 2

Writing each ambiguous position and its side would take about 14 bits; this takes 2 or 3. The scales move by less than a
thousandth, which costs nothing that can be measured.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmpq_fx.coding import string_coder
from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.byte_reader import ByteReader

LEAST_MARGIN, MOST_MARGIN = 2.0**-15, 2.0**-8
"""Margins are fractions of a boundary. The boundaries of CompressAI's tables are an eighth apart."""

_SHIFT = 2.5  # margins per shift; more than two, so that one shift takes a scale out of the margins of its boundary
MOST_SHIFTS = 1000
_MOST_BLOCK = 2**16  # positions; a forged margin must not take much memory
_HEAD = struct.Struct(">fIBI")


@dataclass(frozen=True)
class Guard:
    """The part of a file that makes another machine choose the same CDFs.

    Attributes:
        margin: how far the other machine's scales may differ from the encoder's, as a fraction of a scale.
        shifts: the number of shifts of each block, in the order in which blocks are coded.
        checksum: the checksum of all chosen CDFs and all coded symbols.
    """

    margin: float
    shifts: tuple[int, ...]
    checksum: int

    @property
    def step(self) -> float:
        """The amount that one shift adds to the factor of a block."""
        return _SHIFT * self.margin

    @property
    def block(self) -> int:
        """Positions in a block: so many that about one is within the margin of a boundary, up to a limit."""
        return max(1, round(min(_MOST_BLOCK, 1 / (16 * self.margin))))

    def to_bytes(self) -> bytes:
        """Return the guard as a file holds it, with its shifts coded under a geometric distribution."""
        mean = sum(self.shifts) / max(1, len(self.shifts))
        ratio = min(255, round(256 * mean / (1 + mean)))
        head = _HEAD.pack(self.margin, self.checksum, ratio, len(self.shifts))
        if not self.shifts:
            return head
        shifts = [*self.shifts, *[0] * (string_coder.LEAST_SYMBOLS - len(self.shifts))]
        return head + string_coder.encode(shifts, [0] * len(shifts), _geometric(ratio))

    @classmethod
    def from_bytes(cls, data: bytes, most: int) -> "Guard":
        """Return the guard that ``data`` holds, with at most ``most`` blocks.

        Raises:
            FmpqError: ``data`` is damaged.
        """
        reader = ByteReader(data)
        margin, checksum, ratio, count = _HEAD.unpack(reader.take(_HEAD.size))
        if not (0 < margin <= MOST_MARGIN and count <= most):
            raise FmpqError(f"its guard is damaged: {count} blocks and a margin of {margin:.3g}")
        shifts: Sequence[int] = ()
        if count:
            symbols = max(count, string_coder.LEAST_SYMBOLS)
            strings = string_coder.StringReader(reader.rest(), symbols)
            shifts = strings.read([0] * symbols, _geometric(ratio))[:count]
            if not 0 <= min(shifts) <= max(shifts) < MOST_SHIFTS:
                raise FmpqError(f"its guard is damaged: a block is shifted {max(shifts, key=abs)} times")
        return cls(margin, tuple(shifts), checksum)


def _geometric(ratio: int) -> string_coder.Tables:
    """Return tables of one distribution: each number has ``ratio`` / 256 of the probability of the one before."""
    parts = [max(1, (256 - ratio) * ratio**k * 2**16 // 256 ** (k + 1)) for k in range(32)]
    parts[0] -= sum(parts) + 1 - 2**16  # the last symbol is the escape
    cdf = [0, *np.cumsum([*parts, 1]).tolist()]
    return [cdf], [len(cdf)], [0]


def values_of(prior: Any, scales: Tensor) -> Tensor:
    """Return ``scales`` in float64, flat, on the CPU, with the lower bound of ``prior``."""
    values = scales.detach().flatten().to("cpu", torch.float64, copy=True)
    bound = float(prior.lower_bound_scale.bound)
    # A bound at the first boundary changes no choice, but would move all smaller scales to that boundary.
    return values.clamp(min=bound) if bound > float(prior.scale_table.min()) else values


def boundaries_of(prior: Any) -> Tensor:
    """Return the scales at which ``prior`` chooses another CDF, ascending, float64."""
    boundaries: Tensor = prior.scale_table[:-1].detach().cpu().double().sort().values
    return boundaries


def shifted(values: Tensor, shifts: Tensor, guard: Guard) -> Tensor:
    """Return ``values`` with each block multiplied by the factor of its number of ``shifts``."""
    return values * (1 + shifts.double() * guard.step).repeat_interleave(guard.block)[: len(values)]


def are_near(values: Tensor, boundaries: Tensor, margin: float) -> Tensor:
    """Say which of ``values`` lie within ``margin`` of one of ``boundaries``."""
    above = torch.searchsorted(boundaries * (1 - margin), values, right=True)
    below = torch.searchsorted(boundaries * (1 + margin), values)
    return above > below
