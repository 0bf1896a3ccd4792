"""The container of model files: what is read is what was written, to the last bit, or it is refused; fingerprints."""

import json
import lzma
import re
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.formats.state import save_state
from fmpq_fx.quant import QuantizedLayer
from fmpq_fx.storage import container
from fmpq_fx.storage.container import packed, read, unpacked, write
from fmpq_fx.storage.fingerprint import digest, of_codec, of_entropy_models
from support.small_models import small_model
from support.trained_graphs import trained

ABOUT: dict[str, Any] = {"model": {"class": "a.B", "zoo": None}, "ζ": [1, 2.5, "\n", {}]}
PARTS = {"words": b"a few words", "empty": b"", "weights.g_a.0": bytes(range(256)), "ζ": b"\0"}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "file", ABOUT, PARTS)
    found = read(str(tmp_path / "file"))
    assert found.data == PARTS
    assert ABOUT.items() <= found.about.items()
    assert found.size == (tmp_path / "file").stat().st_size
    assert found.overhead == found.size - sum(map(len, PARTS.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "one", ABOUT, PARTS)
    write(tmp_path / "other", ABOUT, dict(reversed(PARTS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "file", ABOUT, PARTS)
    with safe_open(tmp_path / "file", framework="np") as stored:
        about = json.loads(stored.metadata()["fmpq_fx"])
        parts = {name: stored.get_tensor(name).tobytes() for name in stored.keys()}  # noqa: SIM118 (no dict)
    assert parts == PARTS
    assert (about["format"], about["version"], len(about["sha256"])) == ("fmpq_fx model", 3, 64)


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_is_named(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "VERSION", version)
    write(tmp_path / "file", ABOUT, PARTS)
    monkeypatch.undo()
    words = rf"file has version {version} of the format.*reads version 3 alone; write the file again, with.*save\(\)"
    with pytest.raises(FmpqError, match=words):
        read(tmp_path / "file")


def with_header(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


def saying(about: str) -> bytes:
    """Return a safetensors file without tensors that says ``about`` where ours has its JSON."""
    return with_header(json.dumps({"__metadata__": {"fmpq_fx": about}}).encode())


OURS = '{"format":"fmpq_fx model","version":3,"sha256":%s}'

FOREIGN: dict[str, bytes] = {
    "no bytes": b"",
    "a text": b"hello, this is a text and no model file at all",
    "a zip archive": b"PK\x03\x04" + bytes(100),
    "no header": with_header(b""),
    "a header of 2^63 bytes": with_header(b"{}", 2**63),
    "a header of 2^64 - 1 bytes": with_header(b"{}", 2**64 - 1),
    "a header longer than the file": with_header(b"{}", 1000),
    "a header that is no JSON": with_header(b"{]"),
    "a header that is no object": with_header(b"[]"),
    "a deep header": with_header(b'{"a":' * 50_000),
    "no tensors": with_header(b"{}"),
    "no metadata": with_header(b'{"__metadata__":null}'),
    "a tensor of 2^62 x 2^62": with_header(
        b'{"a":{"dtype":"U8","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}'
    ),
    "a tensor beyond the file": with_header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'),
    "JSON that is deep": saying("[" * 100_000),
    "JSON that is a number": saying("1" * 10_000),
    "JSON that is a list": saying("[]"),
    "JSON that is a text": saying('"x"'),
    "no JSON": saying("{"),
    "another format": saying('{"format":{"a":[]},"version":1}'),
    "no checksum": saying('{"format":"fmpq_fx model","version":1}'),
    "a checksum that is a number": saying(OURS % "1"),
    "an empty checksum": saying(OURS % '""'),
    "a checksum that is no text": saying(OURS % r'"\ud800"'),
    "a version that is a text": saying('{"format":"fmpq_fx model","version":"1"}'),
}  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_something_else_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FmpqError, match=re.escape(str(tmp_path / "file"))):
        read(tmp_path / "file")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool", "complex64"])
def test_another_safetensors_file_is_named_as_such(tmp_path: Path, dtype: str) -> None:
    save_file({"weight": torch.zeros(8).to(getattr(torch, dtype))}, tmp_path / "other.safetensors")
    with pytest.raises(
        FmpqError, match=r"other.safetensors is .*no model file that|no model file: its format is None"
    ):
        read(tmp_path / "other.safetensors")


def test_a_state_file_is_no_model_file(tmp_path: Path) -> None:
    save_state(trained(small_model("mbt2018-mean")), tmp_path / "state", model="mbt2018-mean")
    with pytest.raises(FmpqError, match=r"state is a state file .*, and no model file.*; .*'export model'"):
        read(tmp_path / "state")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(
            FmpqError, match=rf"there is no model file {re.escape(str(path))}; fmpq_fx.save\(\)"
        ):
            read(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("container") / "file"
    write(path, {"model": 1}, {"words": b"a few words", "model": b"\0\1\2\3"})
    return path


def assert_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(FmpqError, match=r"damaged|no model file|version"):
        read(path)


def test_a_file_that_ends_early_or_late_is_refused(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    for length in range(len(content)):
        assert_refused(tmp_path / "file", content[:length])
    for more in (b"\0", b" ", b"a few words"):
        assert_refused(tmp_path / "file", content + more)


def test_a_file_with_a_single_bit_flipped_is_refused(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    for place, byte in enumerate(content):
        flipped = bytes([byte ^ 1 << place % 8])
        assert_refused(tmp_path / "file", content[:place] + flipped + content[place + 1 :])


@given(st.dictionaries(st.integers(0, 250), st.integers(1, 255), min_size=1, max_size=8))
@settings(deadline=None, max_examples=300)
def test_a_file_with_changed_bytes_is_refused(written: Path, changes: dict[int, int]) -> None:
    content = bytearray(written.read_bytes())
    for place, change in changes.items():
        content[place] ^= change
    assert_refused(written.with_name("changed"), bytes(content))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; create it"):
        write(tmp_path / "absent" / "file", ABOUT, PARTS)


def test_of_two_writers_at_once_one_wins_and_readers_see_whole_files(tmp_path: Path) -> None:
    contents = [{"part": bytes([n]) * 100_000} for n in range(2)]
    failures = []

    def repeat(content: dict[str, bytes]) -> None:
        try:
            for _ in range(30):
                write(tmp_path / "file", {}, content)
        except BaseException as error:
            failures.append(error)

    write(tmp_path / "file", {}, contents[0])
    writers = [threading.Thread(target=repeat, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert read(tmp_path / "file").data in contents
    assert not failures
    assert read(tmp_path / "file").data in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@given(st.binary())
@settings(deadline=None, max_examples=10)
def test_what_was_packed_comes_back(data: bytes) -> None:
    assert unpacked(packed(data)) == data


def test_a_part_that_would_fill_the_memory_is_refused_before_it_does() -> None:
    bomb = lzma.compress(bytes((1 << 26) + 1), preset=0)
    assert len(bomb) < 20_000
    with pytest.raises(FmpqError, match="does not end within 67108864 bytes"):
        unpacked(bomb)
    assert unpacked(packed(bytes(1000)), limit=1000) == bytes(1000)
    tracemalloc.start()
    with pytest.raises(FmpqError, match="does not end within 999 bytes"):
        unpacked(bomb, limit=999)
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()
    dictionary_of_2_gb = b"\x5d" + (1 << 31).to_bytes(4, "little") + b"\xff" * 8 + bytes(99)
    with pytest.raises(FmpqError, match="Memory usage limit"):
        unpacked(dictionary_of_2_gb)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "no LZMA": lambda data: b"hello" + data,
    "too short": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "twice": lambda data: data + data,
    "other content": lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_packed_part_that_is_damaged_is_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(FmpqError, match="a packed part"):
        unpacked(damage(packed(b"a few words, some of them twice, some of them twice")))


def test_a_fingerprint_tells_codecs_apart_by_what_they_compute_with() -> None:
    gm = trained(small_model("bmshj2018-hyperprior"))
    before, entropy_models = (of(fmpq_fx.convert(gm)) for of in (of_codec, of_entropy_models))
    layer = gm.get_submodule("g_a.0")
    assert isinstance(layer, QuantizedLayer)
    with torch.no_grad():
        weight, integers = layer.weight, layer.integers
        layer.set_integers(integers)
        assert torch.equal(layer.weight, weight)
        assert of_codec(fmpq_fx.convert(gm)) == before, "another float weight, the same integers"
        integers[0, 0, 0] += 1 if integers[0, 0, 0] < 0 else -1
        layer.set_integers(integers)
        assert of_codec(fmpq_fx.convert(gm)) != before
        assert of_entropy_models(fmpq_fx.convert(gm)) == entropy_models
        gm.get_parameter("entropy_bottleneck.matrices.0").add_(1e-6)
    assert of_entropy_models(fmpq_fx.convert(gm)) != entropy_models


def test_a_fingerprint_depends_on_names_and_values_and_not_on_their_order() -> None:
    state = {
        "a": torch.zeros(2),
        "b": torch.tensor(True),
        "c": torch.zeros(0, 3),
        "d": torch.zeros(1).bfloat16(),
    }
    assert digest(dict(reversed(state.items()))) == digest(state)
    for name, value in {"a": -torch.zeros(2), "b": torch.tensor(False), "e": torch.zeros(0)}.items():
        assert digest({**state, name: value}) != digest(state)
    # The stride of a dimension without elements can be anything.
    assert digest({"c": torch.empty_strided((0,), (0,), dtype=torch.int32)}) == digest({"c": torch.zeros(0)})
