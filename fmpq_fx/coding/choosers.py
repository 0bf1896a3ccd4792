"""Choosers of the CDFs of one image: while it is encoded, rehearsed in other arithmetic, and decoded."""

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
    """Replaces ``build_indexes`` of all conditional entropy models while one image is coded."""

    @abstractmethod
    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """Return the CDF that each of ``scales`` chooses in the table of ``prior``, of the same shape, int32."""

    @abstractmethod
    def is_float(self, layer: str) -> bool:
        """Say whether the input of the quantized ``layer`` is not rounded.

        On the entropy path it is not: rounding would turn a difference in the last place into a whole step.
        """

    def note(self, symbols: Sequence[int], coded: bool) -> None:  # noqa: B027  (most need none)
        """Note a string's symbols, which were just encoded (``coded``) or decoded."""


class Choosing(EntropyModel):
    """A conditional entropy model whose CDFs a chooser chooses; a base class in front of the model's own class."""

    chooser: Chooser

    def build_indexes(self, scales: Tensor) -> Tensor:
        """Return the CDF that each of ``scales`` chooses, of the same shape, int32."""
        return self.chooser.indexes(self, scales)


class ChosenInput(QuantizedLayer):
    """A layer whose input is rounded unless a chooser forbids it; a base class in front of the layer's own class."""

    is_float: Callable[[], bool]

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` itself if the chooser says so, else the input as the layer's class quantizes it."""
        return x if self.is_float() else super().quantized_input(x)


class _Checked(Chooser):
    """A chooser that computes a checksum of the chosen CDFs and the coded symbols."""

    def __init__(self) -> None:
        self.shifts: list[int] = []
        self.strings = 0
        self._chosen = self._symbols = 0

    @property
    def checksum(self) -> int:
        """The checksum of all indexes, in their order, and of the symbols of all strings, in any order."""
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
        chosen: the scales of each call, and the indexes that they chose.
    """

    def __init__(self, margin: float, path: frozenset[str]):
        super().__init__()
        # The margin as the file holds it.
        self._blank, self.path = Guard(float(np.float32(margin)), (), 0), path
        self.chosen: list[tuple[Tensor, Tensor]] = []

    @property
    def guard(self) -> Guard:
        """The guard that a file holds."""
        return Guard(self._blank.margin, tuple(self.shifts), self.checksum)

    def is_float(self, layer: str) -> bool:
        """Say whether ``layer`` is on the path."""
        return layer in self.path

    def note(self, symbols: Sequence[int], coded: bool) -> None:
        """Add the symbols to the checksum if they were encoded."""
        if coded:
            self._add_string(symbols)

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """See :class:`Chooser`.

        Raises:
            FmpqError: scales are not finite, or no shift keeps them away from the boundaries.
        """
        values, boundaries = values_of(prior, scales), boundaries_of(prior)
        if not bool(torch.isfinite(values).all()):
            raise FmpqError(
                "scales are NaN or infinite: the image or the weights of the model hold such numbers"
            )
        shifts = self._shifts(values, boundaries)
        self.shifts += shifts.tolist()
        chosen = torch.searchsorted(boundaries, shifted(values, shifts, self._blank))
        indexes = self._add_indexes(chosen, scales)
        self.chosen.append((values, indexes))
        return indexes

    def _shifts(self, values: Tensor, boundaries: Tensor) -> Tensor:
        """Return the least shift of each block that keeps all of its ``values`` away from ``boundaries``."""
        blocks = -(-values.numel() // self._blank.block)
        filled = F.pad(values, (0, blocks * self._blank.block - values.numel()), value=-1.0)
        rest = torch.arange(blocks, device=values.device)
        shifts = torch.zeros(blocks, dtype=torch.int64, device=values.device)
        scales = filled.view(blocks, self._blank.block)
        for shift in range(MOST_SHIFTS):
            shifts[rest] = shift
            near = are_near(scales[rest] * (1 + shift * self._blank.step), boundaries, self._blank.margin)
            rest = rest[near.any(1)]
            if not len(rest):
                return shifts
        raise FmpqError(
            f"no shift keeps all scales of a block {self._blank.margin:.3g} away from the table's"
        )


class Rehearsed(Exception):  # noqa: N818  (it is no error)
    """The last CDF was chosen, so there is no need to decode further."""


class Rehearsal(Chooser):
    """Decodes with the CDFs that the encoder chose, and measures how far the scales differ from the encoder's.

    Args:
        chosen: see :class:`GuardWriter`.

    Attributes:
        deviation: the largest difference of two scales, as a fraction of the scale.
        path: the names of the quantized layers that ran.
    """

    def __init__(self, chosen: Sequence[tuple[Tensor, Tensor]]):
        self.chosen, self.calls = chosen, 0
        self.deviation = 0.0
        self.path: set[str] = set()

    def is_float(self, layer: str) -> bool:
        """Say yes, and note the layer: all layers that run before the last CDF is chosen are on the path."""
        self.path.add(layer)
        return True

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """Return the indexes that the encoder chose.

        Raises:
            FmpqError: the decoder asks for another number of CDFs than the encoder.
            Rehearsed: this was the last call.
        """
        values, boundaries = values_of(prior, scales), boundaries_of(prior)
        expected, indexes = self.chosen[self.calls]
        if len(values) != len(expected):
            raise FmpqError(
                f"decompress() calls build_indexes otherwise than compress(): with {len(values)} scales in its call "
                f"{self.calls + 1}, where there were {len(expected)}"
            )
        # Below the table all scales choose the same CDF, so their differences do not matter.
        difference = (values - expected).abs() / expected.abs().clamp(min=float(boundaries[0]))
        self.deviation = max(self.deviation, difference.max().item() if len(values) else 0.0)
        self.calls += 1
        if self.calls == len(self.chosen):
            raise Rehearsed
        return indexes.to(scales.device).view(scales.shape)


class GuardReader(_Checked):
    """Chooses while an image is decoded.

    Args:
        guard: the guard in the file.
    """

    def __init__(self, guard: Guard):
        super().__init__()
        self.guard = guard
        # The scales after the shifts, and the boundaries, of each call.
        self._seen: list[tuple[Tensor, Tensor]] = []

    def is_float(self, layer: str) -> bool:
        """Say yes until the last CDF is chosen."""
        return len(self.shifts) < len(self.guard.shifts)

    def note(self, symbols: Sequence[int], coded: bool) -> None:
        """Add the symbols to the checksum if they were decoded."""
        if not coded:
            self._add_string(symbols)

    def indexes(self, prior: Any, scales: Tensor) -> Tensor:
        """See :class:`Chooser`.

        Raises:
            FmpqError: more scales are decoded than were encoded.
        """
        values, boundaries = values_of(prior, scales), boundaries_of(prior)
        first = len(self.shifts)
        shifts = self.guard.shifts[first : first + -(-len(values) // self.guard.block)]
        self.shifts += shifts
        if len(shifts) * self.guard.block < len(values):
            raise FmpqError("decompress() calls build_indexes otherwise than compress(): with more scales")
        factors = torch.tensor(shifts, dtype=torch.int64, device=values.device)
        moved = shifted(values, factors, self.guard)
        self._seen.append((moved, boundaries))
        return self._add_indexes(torch.searchsorted(boundaries, moved), scales)

    def end(self) -> None:
        """Check that all CDFs and symbols are those of the encoder.

        Raises:
            FmpqError: they are not.
        """
        if len(self.shifts) != len(self.guard.shifts):
            raise FmpqError("decompress() calls build_indexes otherwise than compress(): with fewer scales")
        if self.checksum != self.guard.checksum:
            raise FmpqError(self.complaint())

    def complaint(self) -> str:
        """Return the error text for other latents, with a margin that would have been large enough.

        The encoder left no scale within the margins, so scales that lie there now have moved. Their number, relative to
        the number of scales that would lie there by chance, tells the mean difference of scales. The largest
        difference is taken as 16 times the mean.
        """
        near = sum(int(are_near(*seen, self.guard.margin).sum()) for seen in self._seen)
        spread = sum(int(((v > ends[0]) & (v < ends[-1])).sum()) for v, ends in self._seen)
        moved = near / max(1.0, spread * 16 * self.guard.margin)
        if moved < 0.5:
            margin = f"about {2 ** math.ceil(math.log2(max(4.0, 16 * moved) * self.guard.margin)):.2g}"
        else:
            margin = f"more than {8 * self.guard.margin:.2g}"
        return (
            "its latents are not what was encoded: on this machine scales differ by more than its margin of "
            f"{self.guard.margin:.2g} from those of the machine that encoded it; encode it again with a margin of "
            f"{margin}, or decode it where it was encoded"
        )
