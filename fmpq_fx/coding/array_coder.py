"""Code latents as strings, whole arrays at a time, under the CDF tables of CompressAI's entropy models.

The symbols of one CDF are a run (:mod:`fmpq_fx.storage.rans`); the runs come in the order of the indexes. A table's
last symbol is the escape: it stands for all symbols outside of the table. The distances of these follow the runs, at
the price of CompressAI's format: twice the distance above the table, or twice the distance below it less one. First
comes the number of hexadecimal digits of each distance (none for 0), then all digits, the lowest of each first.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fmpq_fx.coding.string_coder import MOST_SYMBOL, too_far
from fmpq_fx.storage import rans

Integers = NDArray[np.int32]

_CDF_BITS = 16  # precision of CompressAI's tables
_MOST_DIGITS = 8
_PLACES = 4 * np.arange(_MOST_DIGITS)  # the lowest bit of each digit


def _distribution(frequencies: NDArray[np.int64]) -> rans.Distribution:
    """Return the distribution of these frequencies (sum 2^16), each moved a little, so that few are equal.

    If a symbol is read in the place of another with the same frequency, the coder's state may go on unchanged, and the
    error is not noticed. With another frequency, the state differs from there to the end.
    """
    apart = frequencies << rans.PRECISION - _CDF_BITS
    moves = np.arange(len(apart)) % 61 - 30
    moves[apart.argmax()] -= moves.sum()
    return rans.distribution(apart + moves)


_DIGIT = _distribution(np.full(16, 1 << _CDF_BITS - 4))


class ArrayCoder:
    """Codes symbols under the CDF tables of an entropy model, which it prepares once.

    Args:
        cdfs: (rows, entries), each row rising from 0 to 2^16.
        lengths: the number of entries of each row.
        offsets: the first symbol of each table.
    """

    def __init__(self, cdfs: Tensor, lengths: Tensor, offsets: Tensor):
        ends = lengths.flatten().tolist()
        rows = cdfs.cpu().numpy().astype(np.int64)
        self._distributions = [_distribution(np.diff(row[:end])) for row, end in zip(rows, ends, strict=True)]
        self._first = offsets.flatten().cpu().numpy().astype(np.int32)
        self._escapes = np.array(ends, np.int32) - 2  # the number of the escape in each table

    def encode(self, symbols: Integers, indexes: Integers) -> bytes:
        """Return the string of ``symbols``, each coded with the CDF of its index; both are flat.

        Raises:
            FmpqError: a symbol is too large to be coded.
            ValueError: the two differ in length, or an index has no CDF.
        """
        order, counts = self._runs(indexes)
        if symbols.shape != indexes.shape:
            raise ValueError(f"{symbols.shape} symbols have {indexes.shape} indexes")
        most = int(np.abs(symbols.astype(np.int64)).max(initial=0))
        if most > MOST_SYMBOL:
            raise too_far(most)
        numbers = symbols[order].astype(np.int32) - np.repeat(self._first, counts)
        escapes = np.repeat(self._escapes, counts)
        outside = (numbers < 0) | (numbers >= escapes)
        distances = np.where(numbers < 0, -2 * numbers - 1, 2 * (numbers - escapes))[outside]
        digits, are_there = _digits(distances)
        parts = np.split(np.where(outside, escapes, numbers), counts.cumsum()[:-1])
        runs = list(zip(parts, self._distributions, strict=True))
        lengths = are_there.sum(1, dtype=np.int32)
        return rans.encode([*runs, (lengths, _DIGIT), (digits[are_there], _DIGIT)])

    def decode(self, string: bytes, indexes: Integers) -> Integers:
        """Return the symbols, int32, flat, that :meth:`encode` coded as ``string``.

        Raises:
            StringError: the string is damaged, or was coded with other CDFs.
            ValueError: an index has no CDF.
        """
        order, counts = self._runs(indexes)
        reader = rans.StringReader(string)
        numbers = reader.read(list(zip(counts.tolist(), self._distributions, strict=True)))
        first, escapes = np.repeat(self._first, counts), np.repeat(self._escapes, counts)
        outside = numbers == escapes
        lengths = reader.read([(int(outside.sum()), _DIGIT)])
        if lengths.max(initial=0) > _MOST_DIGITS:
            raise rans.StringError("a string has a symbol that there is not")
        are_there = np.arange(_MOST_DIGITS) < lengths[:, None]
        digits = np.zeros(are_there.shape, np.int64)
        digits[are_there] = reader.read([(int(lengths.sum()), _DIGIT)])
        reader.end()
        distances = (digits << _PLACES).sum(1)
        values = (
            np.where(distances % 2, -(distances + 1) // 2, escapes[outside] + distances // 2) + first[outside]
        )
        if np.abs(values).max(initial=0) > MOST_SYMBOL or not np.array_equal(
            _digits(distances)[1], are_there
        ):
            raise rans.StringError("a string has a symbol that there is not")
        numbers += first
        numbers[outside] = values
        symbols = np.empty_like(numbers)
        symbols[order] = numbers
        return symbols

    def _runs(self, indexes: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the order in which symbols are coded, and the number of symbols of each CDF."""
        rows = len(self._distributions)
        if indexes.ndim != 1 or indexes.min(initial=0) < 0 or indexes.max(initial=0) >= rows:
            raise ValueError(f"indexes {indexes.shape} are not flat, or not those of {rows} CDFs")
        narrow = indexes.astype(np.min_scalar_type(rows))  # numpy sorts these fastest
        return narrow.argsort(kind="stable"), np.bincount(indexes, minlength=rows)


def _digits(distances: NDArray[Any]) -> tuple[Integers, NDArray[np.bool_]]:
    """Return the digits of each distance, (distances, digits), and whether each of these belongs to it."""
    rest = distances.astype(np.int64)[:, None] >> _PLACES
    return (rest & 15).astype(np.int32), rest > 0
