"""Compress small tensors losslessly: values of one type together, and bytes of equal significance side by side."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.container import packed as packed_bytes
from fmpq_fx.storage.container import unpacked as unpacked_bytes

TABLE = "_quantized_cdf"
"""The ending of the names of CDF tables in a state dict."""

Descriptions = Mapping[str, list[Any]]
"""Per tensor, in order: [name of its dtype, *shape]."""


def name_of(dtype: torch.dtype) -> str:
    """Return the name of ``dtype``, "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of this name; the inverse of :func:`name_of`.

    Raises:
        FmpqError: there is no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise FmpqError(f"there is no type of numbers {name!r}")
    return dtype


def described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return the type and the shape of each of ``tensors``, as :func:`unpacked` needs them."""
    return {name: [name_of(value.dtype), *value.shape] for name, value in tensors.items()}


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the compressed values of ``tensors``, without their types and shapes (:func:`described`)."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for value in tensors.values():
        groups.setdefault(value.dtype, []).append(value.detach().cpu().contiguous().flatten())
    planes = [torch.cat(group).view(torch.uint8).view(-1, dtype.itemsize) for dtype, group in groups.items()]
    return packed_bytes(b"".join(bytes(plane.T.contiguous().numpy()) for plane in planes))


def unpacked(data: bytes, descriptions: Descriptions) -> dict[str, Tensor]:
    """Return the tensors that :func:`packed` made ``data`` of, and :func:`described` the ``descriptions``.

    Raises:
        FmpqError: the two do not belong together.
    """
    groups: dict[torch.dtype, dict[str, tuple[int, ...]]] = {}
    for name, (dtype, *shape) in descriptions.items():
        if not all(type(side) is int and side >= 0 for side in shape):
            raise FmpqError(f"{name} has the impossible shape {shape}")
        groups.setdefault(dtype_of(dtype), {})[name] = tuple(shape)
    content, tensors = unpacked_bytes(data), {}
    for dtype, shapes in groups.items():
        counts = [math.prod(shape) for shape in shapes.values()]
        size = sum(counts) * dtype.itemsize
        if len(content) < size:
            raise FmpqError(
                f"{len(content)} bytes where {size} are needed for {sum(counts)} values of {dtype}"
            )
        planes = np.frombuffer(content[:size], np.uint8).reshape(dtype.itemsize, -1)
        values = torch.from_numpy(planes.T.copy()).flatten().view(dtype)
        for name, value in zip(shapes, values.split(counts), strict=True):
            tensors[name] = value.view(shapes[name]).clone()
        content = content[size:]
    if content:
        raise FmpqError(f"{len(content)} bytes more than its tensors need")
    return tensors


def packed_tables(tables: Mapping[str, Tensor]) -> bytes:
    """Return the compressed CDF tables, int32, (rows, entries) each, whose second differences are mostly small."""
    return packed({name: torch.from_numpy(_differences(t.cpu().numpy())) for name, t in tables.items()})


def unpacked_tables(data: bytes, descriptions: Descriptions) -> dict[str, Tensor]:
    """Return the tables that :func:`packed_tables` made ``data`` of."""
    differences = unpacked(data, descriptions)
    return {name: torch.from_numpy(_sums(value.numpy())) for name, value in differences.items()}


def check_tables(state: Mapping[str, Tensor]) -> None:
    """Check the CDF tables in a state dict, since CompressAI's coder would use impossible ones without any check.

    Raises:
        FmpqError: a table does not rise from 0 to 2^16.
    """
    for name, table in state.items():
        if not name.endswith(TABLE) or table.numel() == 0:
            continue
        lengths, offsets = (
            state.get(name.removesuffix(TABLE) + other) for other in ("_cdf_length", "_offset")
        )
        rows, entries = table.shape
        if lengths is None or offsets is None or lengths.shape != (rows,) or offsets.shape != (rows,):
            raise FmpqError(f"{name} has no lengths or offsets of its {rows} rows")
        if int(lengths.min()) < 3 or int(lengths.max()) > entries:
            raise FmpqError(f"{name} has rows of {lengths.min()} to {lengths.max()} of {entries} entries")
        inside = torch.arange(1, entries) < lengths[:, None]
        rises = (table.long().diff(dim=1) > 0) | ~inside
        ends = table.gather(1, lengths[:, None].long() - 1)
        if not (rises.all() and (table[:, 0] == 0).all() and (ends == 1 << 16).all()):
            raise FmpqError(f"{name} does not rise from 0 to {1 << 16}")


def _differences(table: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return second differences along the rows, with the sign in the lowest bit, so that small ones stay small."""
    if table.size:
        for _ in range(2):
            table = np.diff(table, axis=1, prepend=np.int32(0))
    folded: NDArray[np.int32] = (table << 1) ^ (table >> 31)
    return folded


def _sums(folded: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the table of these differences; the inverse of :func:`_differences`."""
    table = (folded >> 1 & 0x7FFFFFFF) ^ -(folded & 1)
    if table.size:
        for _ in range(2):
            table = np.cumsum(table, axis=1, dtype=np.int32)
    return table
