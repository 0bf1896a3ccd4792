"""Entropy models that pass whole arrays to the coder, where CompressAI's make lists of every symbol and table.

The class of the model still decides which symbols are coded under which CDF. :class:`ArrayModel` only replaces the
methods of its base, CompressAI's ``EntropyModel``::

    GaussianConditional, EntropyBottleneck, or a class of the user's
        │  super().compress(), super().decompress()
    ArrayModel
        │
    EntropyModel
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from compressai.entropy_models import EntropyModel, GaussianConditional
from torch import Tensor, nn

from fmpq_fx.coding.array_coder import ArrayCoder, Integers
from fmpq_fx.coding.string_coder import CheckedModel, unpadded
from fmpq_fx.passes.lower.entropy_path import compares_scales
from fmpq_fx.passes.swap import shallow_copy, subclass


class ArrayModel(CheckedModel):
    """Codes as its base does, into strings of :class:`~fmpq_fx.coding.array_coder.ArrayCoder`.

    Attributes:
        coder: returns the coder for the present tables.
    """

    coder: Callable[[], ArrayCoder]

    def compress(self, inputs: Tensor, indexes: Tensor, means: Tensor | None = None) -> list[bytes]:
        """Return a string for each of ``inputs``, (B, ...), coded with the CDFs of ``indexes``, of the same shape.

        Raises:
            FmpqError: a latent is too far from its mean to be coded.
            ValueError: the shapes differ, or the model has no tables.
        """
        if inputs.ndim < 2 or inputs.shape != indexes.shape:
            raise ValueError(
                f"`inputs` {tuple(inputs.shape)} and `indexes` {tuple(indexes.shape)} should have the same size, of "
                "two dimensions or more"
            )
        self._check_tables()
        strings, coder = [], self.coder()
        for symbols, index in zip(self.quantize(inputs, "symbols", means), indexes, strict=True):
            array = _flat(symbols)
            strings.append(coder.encode(array, _flat(index)))
            self.note(array, True)
        return strings

    def decompress(
        self,
        strings: list[bytes],
        indexes: Tensor,
        dtype: torch.dtype = torch.float,
        means: Tensor | None = None,
    ) -> Tensor:
        """Return the rounded latents that :meth:`compress` coded, in the dtype of ``means``, or else ``dtype``.

        Raises:
            StringError: a string is damaged, or was coded with other CDFs.
            ValueError: the shapes do not fit each other, or the model has no tables.
        """
        if not isinstance(strings, tuple | list) or indexes.ndim < 2 or len(strings) != len(indexes):
            raise ValueError(
                f"`strings` is no list of one string for each of `indexes` {tuple(indexes.shape)}"
            )
        if means is not None and not _fit(means, indexes):
            raise ValueError(f"`means` {tuple(means.shape)} do not fit `indexes` {tuple(indexes.shape)}")
        self._check_tables()
        outputs, coder = self.quantized_cdf.new_empty(indexes.shape), self.coder()
        for string, index, output in zip(strings, indexes, outputs, strict=True):
            array = coder.decode(unpadded(string), _flat(index))
            self.note(array, False)
            output.copy_(torch.from_numpy(array).view(output.shape))
        values: Tensor = self.dequantize(outputs, means, dtype)
        return values

    def _check_tables(self) -> None:
        self._check_cdf_size()
        self._check_cdf_length()
        self._check_offsets_size()


class _Searching(GaussianConditional):
    """Finds the CDFs of scales by a search, where CompressAI compares each scale with each entry of the table.

    Both count the entries that are smaller than a scale, without the last entry; the order of the entries is free.
    """

    def build_indexes(self, scales: Tensor) -> Tensor:
        table = self.scale_table[:-1].sort().values
        if scales.dtype != table.dtype:
            of_compressai: Tensor = super().build_indexes(scales)
            return of_compressai
        return _count_smaller(table, self.lower_bound_scale(scales).contiguous())


def _count_smaller(table: Tensor, values: Tensor) -> Tensor:
    """Return how many entries of the ascending ``table`` are smaller than each of ``values``, which are not negative.

    float32 numbers with the same leading bits lie in one interval, a 32nd of an octave wide. As a rule, it has at most
    one entry of the table. Then the count at its start is looked up and compared with that entry, which takes a quarter
    of the time of a search.
    """
    if values.dtype == torch.float32:
        starts = (torch.arange(1 << 31 - _SHIFT, dtype=torch.int32, device=table.device) << _SHIFT).view(
            torch.float32
        )
        smaller = torch.searchsorted(table, starts, out_int32=True)
        last = smaller.new_full((1,), len(table))
        inside = torch.cat([smaller, last]).diff()
        if inside.max() <= 1:
            entries = torch.cat([table, table.new_full((1,), torch.inf)])[smaller]
            entries = entries.where(inside > 0, torch.inf)
            numbers = (values.view(torch.int32) & 0x7FFFFFFF).view(-1) >> _SHIFT
            counts = smaller.index_select(0, numbers)
            counts += values.view(-1) > entries.index_select(0, numbers)
            return counts.view(values.shape)
    return torch.searchsorted(table, values, out_int32=True)


_SHIFT = 18  # bits of a float32 that are left out: 5 of its mantissa stay


def array_model(model: EntropyModel, note: Callable[[Any, bool], None]) -> nn.Module:
    """Return a twin of ``model`` that makes strings of arrays, and calls ``note(symbols, coded)`` for each string."""
    bases = (_Searching,) if compares_scales(model) else ()
    cls = subclass(type(model), *bases, type(model), ArrayModel)
    return shallow_copy(model, cls, coder=partial(_coder, model), note=note)


_CODERS: "WeakKeyDictionary[EntropyModel, tuple[list[Tensor], ArrayCoder]]" = WeakKeyDictionary()


def _coder(model: EntropyModel) -> ArrayCoder:
    """Return the coder for the tables of ``model``; it is kept while they stay the same."""
    now = [table.cpu() for table in (model.quantized_cdf, model.cdf_length, model.offset)]
    before, coder = _CODERS.get(model, ([], None))
    if coder is None or not all(map(torch.equal, now, before)):
        coder = ArrayCoder(*now)
        _CODERS[model] = [table.clone() for table in now], coder
    return coder


def _flat(numbers: Tensor) -> Integers:
    array: Integers = numbers.reshape(-1).int().cpu().numpy()
    return array


def _fit(means: Tensor, indexes: Tensor) -> bool:
    same = means.shape == indexes.shape
    return same or (means.shape[:2] == indexes.shape[:2] and all(side == 1 for side in means.shape[2:]))
