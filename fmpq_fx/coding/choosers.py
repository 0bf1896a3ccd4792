"""What chooses the CDFs of one image: while it is encoded, rehearsed in other arithmetic, and decoded."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from torch import Tensor

from fmpq_fx.coding.guard import MOST_SHIFTS, Guard, are_near, boundaries_of, shifted, values_of
from fmpq_fx.errors import FmpqError
from fmpq_fx.quant import QuantizedLayer


class Chooser(ABC):
    """Takes the place of ``build_indexes`` of all conditional entropy models while one image is coded."""

    @abstractmethod
    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """Return the CDF that each of ``scales`` chooses in the table of ``prior``, of the same shape, int32."""

    @abstractmethod
    def is_float(self, layer: str) -> bool:
        """Say whether the input of the quantized ``layer`` stays as it is.

        On the entropy path it does. Rounding would make a whole step of a difference in the last place.
        """

    def note(self, symbols: Sequence[int], coded: bool) -> None:  # noqa: B027  (most need none)
        """Note a string's symbols, which were just ``coded`` or decoded."""


class Choosing(EntropyModel):
    """A conditional entropy model whose CDFs a chooser chooses: a base before the class of the model."""

    chooser: Chooser

    def build_indexes(self, scales: Tensor) -> Tensor:
        """Return the CDF that each of ``scales`` chooses, of the same shape, int32."""
        return self.chooser.indexes(self, scales)


class ChosenInput(QuantizedLayer):
    """A layer whose input is rounded where a chooser says so: a base before the class of the layer."""

    is_float: Callable[[], bool]

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` as it is, or what its class makes of it."""
        return x if self.is_float() else super().quantized_input(x)


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
        values, boundaries = values_of(prior, scales), boundaries_of(prior)
        if not bool(torch.isfinite(values).all()):
            raise FmpqError(
                "scales are NaN or infinite: the image or the weights of the model hold such numbers"
            )
        shifts = self._shifts(values, boundaries)
        self.shifts += shifts.tolist()
        chosen = torch.searchsorted(boundaries, shifted(values, shifts, self._plan))
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
        for shift in range(MOST_SHIFTS):
            shifts[rest] = shift
            near = are_near(scales[rest] * (1 + shift * self._plan.step), boundaries, self._plan.margin)
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
        values, boundaries = values_of(prior, scales), boundaries_of(prior)
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
        values, boundaries = values_of(prior, scales), boundaries_of(prior)
        first = len(self.shifts)
        shifts = self.guard.shifts[first : first + -(-len(values) // self.guard.block)]
        self.shifts += shifts
        if len(shifts) * self.guard.block < len(values):
            raise FmpqError("decompress() calls build_indexes otherwise than compress(): with more scales")
        factors = torch.tensor(shifts, dtype=torch.int64)
        moved = shifted(values, factors, self.guard)
        self._seen.append((moved, boundaries))
        return self._add_indexes(torch.searchsorted(boundaries, moved), scales)

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
        near = sum(int(are_near(*seen, self.guard.margin).sum()) for seen in self._seen)
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
