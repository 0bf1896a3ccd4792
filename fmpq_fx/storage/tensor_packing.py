"""Small tensors, losslessly compressed: values of one type together, their most telling bytes side by side."""

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
"""How the names of CDF tables end in a state dict."""

Descriptions = Mapping[str, list[Any]]
"""Per tensor, in order: the name of its dtype, and its shape."""


def name_of(dtype: torch.dtype) -> str:
    """Return the name of ``dtype``, "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that :func:`name_of` named.

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
    """Return the values of ``tensors``; types and shapes are :func:`described` elsewhere."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for value in tensors.values():
        groups.setdefault(value.dtype, []).append(value.detach().cpu().contiguous().flatten())
    planes = [torch.cat(group).view(torch.uint8).view(-1, dtype.itemsize) for dtype, group in groups.items()]
    return packed_bytes(b"".join(bytes(plane.T.contiguous().numpy()) for plane in planes))


def unpacked(data: bytes, descriptions: Descriptions) -> dict[str, Tensor]:
    """Return the tensors of which :func:`packed` returned ``data`` and :func:`described` ``descriptions``.

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
    """Return CDF tables, int32, (rows, entries); their second differences are mostly small."""
    return packed({name: torch.from_numpy(_differences(t.cpu().numpy())) for name, t in tables.items()})


def unpacked_tables(data: bytes, descriptions: Descriptions) -> dict[str, Tensor]:
    """Return the tables of which :func:`packed_tables` returned ``data``."""
    differences = unpacked(data, descriptions)
    return {name: torch.from_numpy(_sums(value.numpy())) for name, value in differences.items()}


def check_tables(state: Mapping[str, Tensor]) -> None:
    """Check that the CDF tables in a state dict are such as CompressAI's coder can follow, which it does blindly.

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
    """Return second differences along the rows, folded so that small ones of either sign are small."""
    if table.size:
        for _ in range(2):
            table = np.diff(table, axis=1, prepend=np.int32(0))
    folded: NDArray[np.int32] = (table << 1) ^ (table >> 31)
    return folded


def _sums(folded: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the table that :func:`_differences` was given."""
    table = (folded >> 1 & 0x7FFFFFFF) ^ -(folded & 1)
    if table.size:
        for _ in range(2):
            table = np.cumsum(table, axis=1, dtype=np.int32)
    return table
