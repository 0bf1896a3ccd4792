"""Choose CDFs so that slightly other floats choose the same ones, and say in a few bytes how that was done.

CompressAI's ``build_indexes`` compares every scale with a table. Another machine computes scales that differ in the
last places; where one lies at a boundary of the table, it may choose another CDF, and all that is decoded after that
is noise. So positions are divided into blocks, and all scales of a block are multiplied by a number close to 1, the
first one with which none of them lies within the margin of a boundary::

    boundaries of the table         |            |             |
    scales of a block              ·|  ·     ·   |    ·   ·    |         one is too close
    the same, times 1 + 1 shift     |·   ·     · |      ·    · |         another one is
    the same, times 1 + 2 shifts    | ·   ·      | ·     ·    ·|·        none is: the file says 2

An encoder that writes each ambiguous position and its side needs about 14 bits for it, this takes 2 or 3. The scales
that are coded with are off by less than a thousandth, which costs nothing that can be measured.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmpq_fx.coding import string_coder
from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.byte_reader import ByteReader

LEAST_MARGIN, MOST_MARGIN = 2.0**-15, 2.0**-8
"""Margins are parts of a boundary, the boundaries of CompressAI's tables are an eighth apart."""

_SHIFT = 2.5  # margins: more than two, so that a scale leaves the margins of its boundary at once
_MOST_SHIFTS = 1000
_MOST_BLOCK = 2**16  # positions: a margin that someone forged must not take memory
_HEAD = struct.Struct(">fIBI")


@dataclass(frozen=True)
class Guard:
    """What a file holds of how its CDFs were chosen.

    Attributes:
        margin: how far other scales may be from the encoder's, as a part of a scale.
        shifts: of each block, in the order in which they are coded.
        checksum: over all that was chosen and coded.
    """

    margin: float
    shifts: tuple[int, ...]
    checksum: int

    @property
    def step(self) -> float:
        """What one shift adds to the factor of a block."""
        return _SHIFT * self.margin

    @property
    def block(self) -> int:
        """How many positions a block has: so many that one of them is within the margin of a boundary, but a limit."""
        return max(1, round(min(_MOST_BLOCK, 1 / (16 * self.margin))))

    def to_bytes(self) -> bytes:
        """Return it as a file holds it: the shifts coded with a geometric distribution."""
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
            if not 0 <= min(shifts) <= max(shifts) < _MOST_SHIFTS:
                raise FmpqError(f"its guard is damaged: a block is shifted {max(shifts, key=abs)} times")
        return cls(margin, tuple(shifts), checksum)


def _geometric(ratio: int) -> string_coder.Tables:
    """Return tables of one distribution, which falls by ``ratio`` / 256 from each number to the next."""
    parts = [max(1, (256 - ratio) * ratio**k * 2**16 // 256 ** (k + 1)) for k in range(32)]
    parts[0] -= sum(parts) + 1 - 2**16  # the last number is for what lies beyond
    cdf = [0, *np.cumsum([*parts, 1]).tolist()]
    return [cdf], [len(cdf)], [0]


class Chooser:
    """Takes the place of ``build_indexes`` of all conditional entropy models while one image is coded."""

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """Return the CDF that each of ``scales`` chooses in the table of ``prior``, of the same shape, int32."""
        raise NotImplementedError

    def is_float(self, layer: str) -> bool:
        """Say whether the input of the quantized ``layer`` stays as it is.

        On the entropy path it does. Rounding would make a whole step of a difference in the last place.
        """
        raise NotImplementedError

    def note(self, symbols: Sequence[int], coded: bool) -> None:
        """Note a string's symbols, which were just ``coded`` or decoded."""


class _Checked(Chooser):
    """A chooser that sums up what was chosen and coded."""

    def __init__(self) -> None:
        self.shifts: list[int] = []
        self.strings = 0
        self._chosen = self._symbols = 0

    @property
    def checksum(self) -> int:
        """Over all indexes, in their order, and the symbols of all strings, in any order."""
        return (self._chosen + self._symbols) % 2**32

    def _add_indexes(self, indexes: Tensor, like: Tensor) -> Tensor:
        self._chosen = zlib.crc32(indexes.numpy().astype("<i2").tobytes(), self._chosen)
        return indexes.to(like.device, torch.int32).view(like.shape)

    def _add_string(self, symbols: Sequence[int]) -> None:
        self.strings += 1
        self._symbols += zlib.crc32(np.asarray(symbols, dtype="<i4").tobytes())


class GuardWriter(_Checked):
    """Chooses while an image is encoded.

    Args:
        margin: see :class:`Guard`.
        path: the names of the quantized layers on the entropy path.

    Attributes:
        chosen: of each call, the scales and the indexes that they chose.
    """

    def __init__(self, margin: float, path: frozenset[str]):
        super().__init__()
        self._plan, self.path = Guard(float(np.float32(margin)), (), 0), path  # as the file holds it
        self.chosen: list[tuple[Tensor, Tensor]] = []

    @property
    def guard(self) -> Guard:
        """What a file holds of it."""
        return Guard(self._plan.margin, tuple(self.shifts), self.checksum)

    def is_float(self, layer: str) -> bool:
        """Say whether ``layer`` is on the path."""
        return layer in self.path

    def note(self, symbols: Sequence[int], coded: bool) -> None:
        """Add what was coded to the checksum."""
        if coded:
            self._add_string(symbols)

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """See :class:`Chooser`.

        Raises:
            FmpqError: the scales are no numbers, or lie so that no shift would do.
        """
        values, boundaries = _values(prior, scales), _boundaries(prior)
        if not bool(torch.isfinite(values).all()):
            raise FmpqError(
                "scales are NaN or infinite: the image or the weights of the model hold such numbers"
            )
        shifts = self._shifts(values, boundaries)
        self.shifts += shifts.tolist()
        chosen = torch.searchsorted(boundaries, _shifted(values, shifts, self._plan))
        indexes = self._add_indexes(chosen, scales)
        self.chosen.append((values, indexes))
        return indexes

    def _shifts(self, values: Tensor, boundaries: Tensor) -> Tensor:
        """Return the least shift of each block with which none of its ``values`` is near one of ``boundaries``."""
        blocks = -(-values.numel() // self._plan.block)
        filled = F.pad(values, (0, blocks * self._plan.block - values.numel()), value=-1.0)
        rest = torch.arange(blocks)
        shifts = torch.zeros(blocks, dtype=torch.int64)
        scales = filled.view(blocks, self._plan.block)
        for shift in range(_MOST_SHIFTS):
            shifts[rest] = shift
            near = _are_near(scales[rest] * (1 + shift * self._plan.step), boundaries, self._plan.margin)
            rest = rest[near.any(1)]
            if not len(rest):
                return shifts
        raise FmpqError(f"no shift keeps all scales of a block {self._plan.margin:.3g} away from the table's")


class Rehearsed(Exception):  # noqa: N818  (it is no error)
    """The last CDF was chosen: what comes after that decodes nothing."""


class Rehearsal(Chooser):
    """Decodes what was encoded, with the same CDFs, and sees by how much the scales differ here.

    Args:
        chosen: see :class:`GuardWriter`.

    Attributes:
        deviation: the largest difference of two scales, as a part of them.
        path: the quantized layers that ran.
    """

    def __init__(self, chosen: Sequence[tuple[Tensor, Tensor]]):
        self.chosen, self.calls = chosen, 0
        self.deviation = 0.0
        self.path: set[str] = set()

    def is_float(self, layer: str) -> bool:
        """Say yes, and note the layer: all that runs before the last CDF is chosen is on the path."""
        self.path.add(layer)
        return True

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """Return what was chosen when this was encoded.

        Raises:
            FmpqError: what was coded then is not what is decoded now.
            Rehearsed: this was the last call.
        """
        values, boundaries = _values(prior, scales), _boundaries(prior)
        expected, indexes = self.chosen[self.calls]
        if len(values) != len(expected):
            raise FmpqError(
                f"decompress() calls build_indexes otherwise than compress(): with {len(values)} scales in its call "
                f"{self.calls + 1}, where there were {len(expected)}"
            )
        # Below the table all scales choose the same, and how far they lie from each other does not matter.
        difference = (values - expected).abs() / expected.abs().clamp(min=float(boundaries[0]))
        self.deviation = max(self.deviation, difference.max().item() if len(values) else 0.0)
        self.calls += 1
        if self.calls == len(self.chosen):
            raise Rehearsed
        return indexes.to(scales.device).view(scales.shape)


class GuardReader(_Checked):
    """Chooses while an image is decoded.

    Args:
        guard: what the file holds.
    """

    def __init__(self, guard: Guard):
        super().__init__()
        self.guard = guard
        self._seen: list[
            tuple[Tensor, Tensor]
        ] = []  # the scales that chose, and the boundaries, of each call

    def is_float(self, layer: str) -> bool:
        """Say yes until the last CDF is chosen."""
        return len(self.shifts) < len(self.guard.shifts)

    def note(self, symbols: Sequence[int], coded: bool) -> None:
        """Add what was decoded to the checksum."""
        if not coded:
            self._add_string(symbols)

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """See :class:`Chooser`.

        Raises:
            FmpqError: more is decoded than was encoded.
        """
        values, boundaries = _values(prior, scales), _boundaries(prior)
        first = len(self.shifts)
        shifts = self.guard.shifts[first : first + -(-len(values) // self.guard.block)]
        self.shifts += shifts
        if len(shifts) * self.guard.block < len(values):
            raise FmpqError("decompress() calls build_indexes otherwise than compress(): with more scales")
        factors = torch.tensor(shifts, dtype=torch.int64)
        shifted = _shifted(values, factors, self.guard)
        self._seen.append((shifted, boundaries))
        return self._add_indexes(torch.searchsorted(boundaries, shifted), scales)

    def end(self) -> None:
        """Check that all was chosen and decoded as it was encoded.

        Raises:
            FmpqError: it was not.
        """
        if len(self.shifts) != len(self.guard.shifts):
            raise FmpqError("decompress() calls build_indexes otherwise than compress(): with fewer scales")
        if self.checksum != self.guard.checksum:
            raise FmpqError(self.complaint())

    def complaint(self) -> str:
        """Say that it differs, and which margin would have done.

        The encoder left no scale within the margins. Those that are there now moved into them: their part of all that
        would be there says by how much scales differ on the average, of which the largest was 16 times as much.
        """
        near = sum(int(_are_near(*seen, self.guard.margin).sum()) for seen in self._seen)
        spread = sum(int(((v > ends[0]) & (v < ends[-1])).sum()) for v, ends in self._seen)
        part = near / max(1.0, spread * 16 * self.guard.margin)
        if part < 0.5:
            margin = f"about {2 ** math.ceil(math.log2(max(4.0, 16 * part) * self.guard.margin)):.2g}"
        else:
            margin = f"more than {8 * self.guard.margin:.2g}"
        return (
            "its latents are not what was encoded: on this machine scales differ by more than its margin of "
            f"{self.guard.margin:.2g} from those of the machine that encoded it; encode it again with a margin of "
            f"{margin}, or decode it where it was encoded"
        )


def _values(prior: Any, scales: Tensor) -> Tensor:
    """Return ``scales`` in float64, in a row."""
    values = scales.detach().flatten().to("cpu", torch.float64, copy=True)
    bound = float(prior.lower_bound_scale.bound)
    # A bound at the first boundary changes no choice, and would put all scales below it there.
    return values.clamp(min=bound) if bound > float(prior.scale_table[0]) else values


def _boundaries(prior: Any) -> Tensor:
    boundaries: Tensor = prior.scale_table[:-1].detach().cpu().double()
    return boundaries


def _shifted(values: Tensor, shifts: Tensor, plan: Guard) -> Tensor:
    return values * (1 + shifts.double() * plan.step).repeat_interleave(plan.block)[: len(values)]


def _are_near(values: Tensor, boundaries: Tensor, margin: float) -> Tensor:
    """Say which of ``values`` lie within ``margin`` of one of ``boundaries``."""
    above = torch.searchsorted(boundaries * (1 - margin), values, right=True)
    below = torch.searchsorted(boundaries * (1 + margin), values)
    return above > below
