"""What a model file holds besides weights: tensors of all types come back bit for bit, or are refused."""

import json
import lzma
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from torch import Tensor

from fmpq_fx import FmpqError, container
from fmpq_fx.tensor_packing import (
    described,
    dtype_of,
    name_of,
    packed,
    packed_tables,
    unpacked,
    unpacked_tables,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
SHAPES = [(), (1,), (0,), (2, 0, 3), (7,), (3, 4), (2, 1, 3, 2)]
INT32 = torch.iinfo(torch.int32)


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of random bits, among them those of NaN, of infinities and of -0."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    values = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point and len(values) > 4:
        values[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    return values.view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert bits(found[name]) == bits(value), name


def as_json(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the descriptions as a file brings them back."""
    loaded: dict[str, Any] = json.loads(json.dumps(described(tensors)))
    return loaded


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_tensors_of_every_type_and_shape_come_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {f"{shape}": random(shape, dtype) for shape in SHAPES}
    assert_same(unpacked(packed(tensors), as_json(tensors)), tensors)
    assert dtype_of(name_of(dtype)) is dtype


def test_tensors_of_all_types_together_come_back() -> None:
    torch.manual_seed(0)
    # The types alternate, so that those that lie together were not given together.
    tensors = {f"{shape} {dtype}": random(shape, dtype) for shape in SHAPES for dtype in DTYPES}
    assert_same(unpacked(packed(tensors), as_json(tensors)), tensors)
    assert unpacked(packed({}), {}) == {}


def test_views_and_parameters_come_back_as_tensors_of_their_own() -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(base.clone()),
        "twice": base,
        "again": base,
    }
    found = unpacked(packed(tensors), as_json(tensors))
    assert_same(found, {name: value.detach() for name, value in tensors.items()})
    found["twice"].zero_()
    assert torch.equal(found["again"], base)


def test_numbers_alike_take_fewer_bytes_than_with_lzma_alone() -> None:
    torch.manual_seed(0)
    tensors = {f"{n}": 0.1 * torch.randn(64) for n in range(30)}
    plain = lzma.compress(b"".join(map(bits, tensors.values())), preset=9 | lzma.PRESET_EXTREME)
    assert len(packed(tensors)) < 0.95 * len(plain)


TABLES: dict[str, Tensor] = {
    "of a codec": torch.tensor([[0, 5, 60000, 65536, 0, 0], [0, 1, 2, 3, 65535, 65536]], dtype=torch.int32),
    "not made yet": torch.zeros(0, dtype=torch.int32),
    "no rows": torch.zeros(0, 4, dtype=torch.int32),
    "no entries": torch.zeros(3, 0, dtype=torch.int32),
    "one entry": torch.tensor([[INT32.max], [INT32.min]], dtype=torch.int32),
    "extremes": torch.tensor(
        [[INT32.min, INT32.max, INT32.min, 0, -1, INT32.max, INT32.max]], dtype=torch.int32
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_come_back(name: str) -> None:
    tables = {name: TABLES[name]}
    assert_same(unpacked_tables(packed_tables(tables), as_json(tables)), tables)


@given(st.integers(0, 4), st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=20)
def test_any_tables_come_back(rows: int, entries: int, data: st.DataObject) -> None:
    numbers = st.one_of(st.integers(INT32.min, INT32.max), st.sampled_from([INT32.min, INT32.max, 0, -1]))
    values = data.draw(st.lists(numbers, min_size=rows * entries, max_size=rows * entries))
    tables = {"any": torch.tensor(values, dtype=torch.int32).view(rows, entries), **TABLES}
    assert_same(unpacked_tables(packed_tables(tables), as_json(tables)), tables)


def test_tables_take_fewer_bytes_than_with_lzma_alone() -> None:
    scales = np.exp(np.linspace(np.log(0.11), np.log(256), 64))[:, None]
    cumulative = 65536 * expit((np.arange(1000) - 500) / scales)
    table = torch.from_numpy(cumulative.astype(np.int32))
    assert len(packed_tables({"table": table})) < 0.6 * len(container.packed(bits(table)))


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4), "c": torch.ones(2)}


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("a", ["float32", 2, 4]),
        ("a", ["float32", 2, 2]),
        ("a", ["float32"]),
        ("a", ["float16", 2, 3]),
        ("a", ["float64", 2, 3]),
        ("b", ["int32", 4]),
        ("d", ["float32", 1]),
        ("d", ["uint8", 1]),
        ("a", ["float32", 10**12, 10**12]),
        ("a", ["float32", -6]),
        ("a", ["float32", -2, 3]),
        ("a", ["float32", -2, -3]),
        ("a", ["float32", 2, 3, -1, -1]),
        ("c", ["float32", -4]),
        ("d", ["float32", 0, -1]),
        ("d", ["float32", 0, -5]),
        ("a", ["float31", 2, 3]),
        ("a", ["nn", 2, 3]),
        ("a", ["__name__", 2, 3]),
        ("a", ["torch.float32", 2, 3]),
        ("a", ["", 2, 3]),
    ],
    ids=str,
)
def test_descriptions_of_something_else_are_refused(name: str, description: list[Any]) -> None:
    with pytest.raises(FmpqError):
        unpacked(packed(TENSORS), {**as_json(TENSORS), name: description})


def test_fewer_and_other_bytes_are_refused() -> None:
    content, descriptions = packed(TENSORS), as_json(TENSORS)
    for data in (b"", content[:-1], content + b"\0", packed({}), packed({**TENSORS, "d": torch.ones(1)})):
        with pytest.raises(FmpqError):
            unpacked(data, descriptions)
    del descriptions["c"]
    with pytest.raises(FmpqError, match="8 bytes more than its tensors need"):
        unpacked(content, descriptions)
