"""The parts of a model file: tensors of all types come back bit for bit; forged parts are refused, and do no harm."""

import json
import lzma
import math
import operator
import os
import re
import resource
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from torch import Tensor

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.quant import quantize_layer
from fmpq_fx.storage import container
from fmpq_fx.storage.tensor_packing import (
    described,
    dtype_of,
    name_of,
    packed,
    packed_tables,
    unpacked,
    unpacked_tables,
)
from support.layer_cases import CASES as LAYERS
from support.layer_cases import effective, made, output_channels
from support.small_models import small_model
from support.trained_graphs import trained

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip
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


OTHERS = "float32 2 4|float32 2 2|float32|float32 1000000000000 1000000000000|float16 2 3|float64 2 3"
OTHERS += "|float32 -6|float32 -2 3|float32 -2 -3|float32 2 3 -1 -1|float32 0 -1|float32 0 -5"
OTHERS += "|float31 2 3|nn 2 3|__name__ 2 3|torch.float32 2 3"


@pytest.mark.parametrize("description", OTHERS.split("|"))
def test_descriptions_of_something_else_are_refused(description: str) -> None:
    dtype, *shape = description.split()
    for name in ("a", "one more"):
        with pytest.raises(FmpqError):
            unpacked(packed(TENSORS), {**as_json(TENSORS), name: [dtype, *map(int, shape)]})


def test_fewer_and_other_bytes_are_refused() -> None:
    content, descriptions = packed(TENSORS), as_json(TENSORS)
    for data in (b"", content[:-1], content + b"\0", packed({}), packed({**TENSORS, "d": torch.ones(1)})):
        with pytest.raises(FmpqError):
            unpacked(data, descriptions)
    del descriptions["c"]
    with pytest.raises(FmpqError, match="8 bytes more than its tensors need"):
        unpacked(content, descriptions)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "file"
    fmpq_fx.save(trained(small_model("bmshj2018-hyperprior")), path)
    return path


def forged(path: Path, to: Path, place: tuple[str, ...], value: Any) -> Path:
    """Write ``path`` to ``to`` with another value at ``place``, or without one for ..., and a true checksum."""
    held = container.read(path)
    words = json.loads(container.unpacked(held.data["words"]))
    file = {"model": held.about["model"], "data": {**held.data, "words": words}}
    *way, last = place
    inner: Any = reduce(operator.getitem, way, file)
    inner[last] = value(inner[last]) if callable(value) else value
    if value is ...:
        del inner[last]
    if not isinstance(file["data"].get("words", b""), bytes):
        file["data"]["words"] = container.packed(json.dumps(file["data"]["words"]).encode())
    container.write(to, {name: part for name, part in file.items() if name != "data"}, file["data"])
    return to


WEIGHT, BIAS, STEPS = "g_a.0.weight", "g_a.0.bias", "g_a.0.weight_quantizer.log_scale"
CDF = "entropy_bottleneck._quantized_cdf"
FORGERIES: dict[str, list[Any]] = {
    f"words weights {WEIGHT}": [
        [10**12, 1, 1, 1], [10**6, 10**6], [8, 3, 5, 6], [3, 8, 5, 5], [-8, 3, 5, 5], [8, 3, 25], ["8", 3, 5, 5], 5, ...
    ],
    "words weights other": [[1], [10**12, -1]],
    "words layouts g_a.0": [[3, 8, 25], [8, 3], [10**6, 10**6, 1], 5, ...],
    f"words model {BIAS}": [["float32", 9], ["float32", 10**12], ["float31", 8], [], [8], 5, ...],
    f"words tables {CDF}": [["float32", 8, 23], ["int32", 23, 8], ["int32", 8, 22], 5, ...],
    f"words quantizers {STEPS}": [["float32", 4], ["int8", 32], ["float32", 8, 1, 1], 5, ...],
    "words plan bits g_a.0": [17, 10**9, 1, 0, -4, 4.0, "4", [4], True, ...],
    "words plan activation_bits": [17, 99, 1, -8, 8.0, "8", [8], True, {}, ...],
    "words plan activation_bits g_a.0": [17, 1, -8, 8.0, "8", [8], True, ...],
    "words plan clips g_a.0": ["x", [1], 0, 1.5, -0.5, float("nan")],
    "words plan inputs g_a.0": [[0], ["a", "b"], 5, {}, {"low": 0.0, "high": 1.0, "whole": False, "spread": [1]}, ...],
    "words plan": [None, {}, []],
    "words": [None, [], {}, "words", b"", container.packed(b"["), container.packed(b"[" * 100_000), ...],
    "data weights.g_a.0": [b"", b"\0\0", b"\xff" * 99, bytes(10), ...],
    "data quantizers": [b"", container.packed(b""), ...],
    "data tables": [container.packed(b""), ...],
    "model": [None, {}, "ScaleHyperprior", ...],
    "model dtype": ["int64", "nn", 5, None, ...],
    "model zoo": ["mbt2018-mean", "no-such-model", "sample", 5, [], None, ...],
}  # fmt: skip
CASES = [(place, value) for place, values in FORGERIES.items() for value in values]


@pytest.mark.parametrize(("place", "value"), CASES, ids=lambda value: str(value)[:40])
def test_a_forged_file_is_refused(place: str, value: Any, honest: Path, tmp_path: Path) -> None:
    way = tuple(place.split())
    path = forged(honest, tmp_path / "forged", ("data", *way) if way[0] == "words" else way, value)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for action in (fmpq_fx.load, fmpq_fx.load_codec):
        with pytest.raises(FmpqError, match=re.escape(str(path))):
            action(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "it took 200 MB of memory"


def test_a_forged_history_is_refused(honest: Path, tmp_path: Path) -> None:
    for value in (5, "history"):
        with pytest.raises(FmpqError, match="forged"):
            fmpq_fx.load(forged(honest, tmp_path / "forged", ("data", "words", "history"), value))


def test_weights_that_no_file_of_that_size_holds_get_no_memory(honest: Path, tmp_path: Path) -> None:
    place = ("data", "words", "weights", WEIGHT)
    with pytest.raises(FmpqError, match=r"forged: a file of \d+ bytes cannot hold \d{13} weights"):
        fmpq_fx.load(forged(honest, tmp_path / "forged", place, [10**12, 1, 1, 1]))


def test_a_file_cannot_have_anything_imported_and_called(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(os, "trap", lambda: called.append(True), raising=False)
    with pytest.raises(FmpqError, match="forged"):
        fmpq_fx.load_codec(forged(honest, tmp_path / "forged", ("model", "zoo"), "os:trap"))
    assert not called


@pytest.mark.parametrize("damage", ["lengths", "zeros", "falling", "end", "wrapping"])
def test_tables_that_are_none_never_reach_the_coder(damage: str, honest: Path, tmp_path: Path) -> None:
    # CompressAI's coder follows tables wherever they lead it, out of its memory too.
    held = container.read(honest)
    words = json.loads(container.unpacked(held.data["words"]))
    state = unpacked(held.data["model"], words["model"])
    tables = unpacked_tables(held.data["tables"], words["tables"])
    lengths, table = state["entropy_bottleneck._cdf_length"], tables[CDF]
    if damage in ("lengths", "wrapping"):
        lengths.fill_(10**8 if damage == "lengths" else 5)
    if damage == "wrapping":  # a step of 1, to int32
        table[:, :5] = torch.tensor([0, INT32.max, INT32.min, -1, 1 << 16])
    tables[CDF] = {"zeros": table * 0, "falling": table.flip(1), "end": table - 1}.get(damage, table)
    data = {**held.data, "model": packed(state), "tables": packed_tables(tables)}
    container.write(tmp_path / "forged", {"model": held.about["model"]}, data)
    for action in (fmpq_fx.load, fmpq_fx.load_codec):
        with pytest.raises(FmpqError, match="forged"):
            action(tmp_path / "forged")


COMPUTED = ("conv with weight norm", "spectral conv")  # from other parameters: there is no place for a weight


@pytest.mark.parametrize("case", [case for case in LAYERS if case not in COMPUTED])
@pytest.mark.parametrize("bits", [2, 8])
def test_integers_are_laid_out_by_output_channel_and_bring_the_weight_back(case: str, bits: int) -> None:
    layer = made(LAYERS[case][0])
    quantized = quantize_layer(layer, bits)
    integers, before = quantized.integers, quantized.weight.detach().clone()
    rows = output_channels(layer, effective(layer))
    places = effective(layer)[0, 0].numel()
    assert integers.shape == (len(rows), rows[0].numel() // places, places), "(out, in, places)"
    quantizer = quantized.weight_quantizer
    for integer, row, step in zip(integers, rows, quantizer.scale.detach().flatten(), strict=True):
        on_grid = (row / step).round().clamp(quantizer.low, quantizer.high)
        assert torch.equal(integer.flatten().float(), on_grid.flatten())

    layer.get_parameter(quantized.weight_name).data.fill_(0.1)
    assert not torch.equal(quantized.weight, before)
    quantized.set_integers(integers)
    assert torch.equal(quantized.weight, before)
    assert torch.equal(quantized.integers, integers)
