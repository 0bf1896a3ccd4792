"""Latents as strings, whole arrays at a time, under the CDF tables of CompressAI's entropy models.

The symbols of one CDF are a run (:mod:`fmpq_fx.storage.rans`), the runs come in the order of the indexes. A table's
last symbol stands for whatever lies outside of it. Behind the runs come four bytes, the lowest first, for each that
stood for something: the symbol times two, or for a negative one the magnitude times two less one.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fmpq_fx.coding.string_coder import MOST_SYMBOL
from fmpq_fx.errors import FmpqError
from fmpq_fx.storage import rans

Integers = NDArray[np.int32]

_CDF_BITS = 16  # of CompressAI's tables
_BYTE = rans.distribution(np.full(256, 1 << rans.PRECISION - 8))


class ArrayCoder:
    """Codes symbols under the CDF tables of an entropy model, which it prepares once.

    Args:
        cdfs: (rows, entries), each row rising from 0 to 2^16.
        lengths: how many of its entries a row has.
        offsets: the symbol that each table starts with.
    """

    def __init__(self, cdfs: Tensor, lengths: Tensor, offsets: Tensor):
        ends = lengths.flatten().tolist()
        rows = cdfs.cpu().numpy().astype(np.int64)
        self._distributions = [
            rans.distribution(np.diff(row[:end]) << rans.PRECISION - _CDF_BITS)
            for row, end in zip(rows, ends, strict=True)
        ]
        self._first = offsets.flatten().cpu().numpy().astype(np.int32)
        self._escapes = np.array(ends, np.int32) - 2  # as a number in its table

    def encode(self, symbols: Integers, indexes: Integers) -> bytes:
        """Return the string of ``symbols``, each coded with the CDF of its index; both are flat.

        Raises:
            FmpqError: a symbol is too large to be one.
            ValueError: the two differ in length, or there is no such CDF.
        """
        order, counts = self._runs(indexes)
        if symbols.shape != indexes.shape:
            raise ValueError(f"{symbols.shape} symbols have {indexes.shape} indexes")
        most = int(np.abs(symbols.astype(np.int64)).max(initial=0))
        if most > MOST_SYMBOL:
            raise FmpqError(f"a latent is {most} steps away from its mean; at most {MOST_SYMBOL} are coded")
        numbers = symbols[order].astype(np.int32) - np.repeat(self._first, counts)
        escapes = np.repeat(self._escapes, counts)
        outside = (numbers < 0) | (numbers >= escapes)
        values = symbols[order][outside].astype(np.int64)
        escaped = np.where(values < 0, -2 * values - 1, 2 * values).astype("<u4").view(np.uint8)
        parts = np.split(np.where(outside, escapes, numbers), counts.cumsum()[:-1])
        runs = list(zip(parts, self._distributions, strict=True))
        return rans.encode([*runs, (escaped.astype(np.int32), _BYTE)])

    def decode(self, string: bytes, indexes: Integers) -> Integers:
        """Return the symbols, int32, of which :meth:`encode` returned ``string``.

        Raises:
            FmpqError: the string is of other symbols.
            ValueError: there is no such CDF.
        """
        order, counts = self._runs(indexes)
        reader = rans.StringReader(string)
        numbers = reader.read(list(zip(counts.tolist(), self._distributions, strict=True)))
        first, escapes = np.repeat(self._first, counts), np.repeat(self._escapes, counts)
        outside = numbers == escapes
        escaped = reader.read([(4 * int(outside.sum()), _BYTE)]).astype(np.uint8).view("<u4").astype(np.int64)
        reader.end()
        values = np.where(escaped % 2, -(escaped + 1) // 2, escaped // 2)
        inside = (values >= first[outside]) & (values < first[outside] + escapes[outside])
        if inside.any() or np.abs(values).max(initial=0) > MOST_SYMBOL:
            raise FmpqError("a string has a symbol where it cannot be")
        numbers += first
        numbers[outside] = values
        symbols = np.empty_like(numbers)
        symbols[order] = numbers
        return symbols

    def _runs(self, indexes: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the order in which symbols are coded, and how many each CDF has."""
        rows = len(self._distributions)
        if indexes.ndim != 1 or indexes.min(initial=0) < 0 or indexes.max(initial=0) >= rows:
            raise ValueError(f"indexes {indexes.shape} are not flat, or not those of {rows} CDFs")
        narrow = indexes.astype(np.min_scalar_type(rows))  # numpy sorts these fastest
        return narrow.argsort(kind="stable"), np.bincount(indexes, minlength=rows)
