"""Images as files: what is decoded is what the codec decoded, or a clear error."""

import contextlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.ops import compute_padding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import pad as pad_image

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.coding.fmi import MAGIC, VERSION, decode, encode
from fmpq_fx.coding.guarded import Robust
from fmpq_fx.storage import fingerprint
from fmpq_fx.storage.byte_reader import ByteReader, counted
from support.coded_models import graph_of
from support.small_models import SMALL, small_model
from support.traced_models import WITH_CODEC, lively


def ready(model: nn.Module) -> nn.Module:
    model.update(force=True)  # type: ignore[operator]
    return model.eval()


def picture(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(2))


CODEC = ready(small_model("bmshj2018-hyperprior"))
DATA = encode(CODEC, picture(40, 70))


def sealed(body: bytes, version: int = VERSION) -> bytes:
    """Return ``body`` with a right checksum, as one who forges a file would."""
    return MAGIC + bytes([version]) + struct.pack(">I", zlib.crc32(body)) + body


def forged(
    height: int = 40, width: int = 70, shape: object = (1, 2), strings: tuple[bytes, ...] = (b"",)
) -> bytes:
    parts = [bytes.fromhex(fingerprint.of_codec(CODEC))[:8] + struct.pack(">IIH", height, width, 64)]
    parts += [counted(b"ScaleHyperprior", 1), counted(json.dumps(shape).encode(), 2)]
    parts += [b"\0", counted(b"", 4), bytes([len(strings)])]
    return sealed(b"".join(parts) + b"".join(counted(string, 4) for string in strings), 2)


def with_form(form: str) -> bytes:
    """Return a file of version 3 with that form, and no strings."""
    start = forged(shape=[1, 2])[9:]
    return sealed(start[: start.index(b"[1, 2]") + len(b"[1, 2]") + 5] + counted(form.encode(), 4))


def of_version_1(height: int, width: int, shape: list[int], *strings: bytes) -> bytes:
    body = bytes.fromhex(fingerprint.of_codec(CODEC))[:8] + struct.pack(">II", height, width)
    body += counted(b"ScaleHyperprior", 1) + counted(json.dumps(shape).encode(), 2) + bytes([len(strings)])
    return sealed(body + b"".join(counted(string, 4) for string in strings), 1)


@pytest.mark.parametrize("size", [(64, 64), (40, 70), (65, 64), (1, 1)])
@pytest.mark.parametrize("name", SMALL)
def test_an_image_of_any_size_is_what_the_codec_decodes(name: str, size: tuple[int, int]) -> None:
    codec, image = ready(small_model(name)), picture(*size)
    with torch.no_grad():
        pad, unpad = compute_padding(*size, min_div=64)
        coded = codec.compress(pad_image(image[None], pad))  # type: ignore[operator]
        expected = codec.decompress(coded["strings"], coded["shape"])["x_hat"]  # type: ignore[operator]
    data = encode(codec, image, robust=None)
    assert torch.equal(decode(codec, data), pad_image(expected, unpad)[0].clamp(0, 1))
    assert torch.equal(decode(codec, encode(codec, image)), decode(codec, data))
    strings = sum(len(string[0]) for string in coded["strings"])
    assert len(data) - strings < 90  # what the container takes


NESTS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[bytes, bytes]]]] = {
    "bare": (lambda y, z: [y, z], lambda nest: (nest[0], nest[1])),
    "deep": (lambda y, z: ([[[y]], []], [z]), lambda nest: (nest[0][0][0][0], nest[1][0])),
    "named": (lambda y, z: {"y": [y], "z": z}, lambda nest: (nest["y"][0], nest["z"])),
}


def nesting(nest: str) -> nn.Module:
    """Return a codec whose class has a form of its own for its strings."""
    change, undo = NESTS[nest]

    class Other(type(CODEC)):  # type: ignore[misc]
        def compress(self, x: Tensor) -> dict[str, object]:
            coded = super().compress(x)
            return {**coded, "strings": change(*(string for (string,) in coded["strings"]))}

        def decompress(self, strings: Any, shape: Any) -> Any:
            return super().decompress([[string] for string in undo(strings)], shape)

    model = ready(small_model("bmshj2018-hyperprior"))
    model.__class__ = Other
    return model


@pytest.mark.parametrize("robust", ["auto", None])
@pytest.mark.parametrize("nest", NESTS)
def test_strings_are_nested_as_the_class_nests_them(nest: str, robust: Robust) -> None:
    image, codec = picture(40, 70), nesting(nest)
    data = encode(codec, image, robust=robust)
    assert data[4] == VERSION == DATA[4] + 1, "what others read as well is written for them"
    assert torch.equal(decode(codec, data), decode(CODEC, encode(CODEC, image, robust=robust)))
    assert len(data) < len(encode(CODEC, image, robust=robust)) + 40


def test_the_bits_of_nested_strings_are_counted() -> None:
    image = {"a": picture(64, 64)}
    expected = fmpq_fx.evaluate(CODEC, image).bpp
    for nest in NESTS:
        assert fmpq_fx.evaluate(nesting(nest), image).bpp == expected


def test_keys_that_a_file_would_change_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NESTS, "numbered", (lambda y, z: {0: y, 1: z}, lambda nest: (nest[0], nest[1])))
    with pytest.raises(FmpqError, match="in a dict with the key 0; expected text as keys"):
        encode(nesting("numbered"), picture(40, 70), robust=None)


def test_what_is_no_string_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NESTS, "lengths", (lambda y, z: [y, len(z)], NESTS["bare"][1]))
    with pytest.raises(FmpqError, match="a value of type int; expected bytes, in lists"):
        encode(nesting("lengths"), picture(40, 70), robust=None)


@pytest.mark.parametrize("name", ["cheng2020-checkerboard", "elic-official"])
def test_a_latent_codec_is_told_the_sizes_of_all_its_latents(name: str) -> None:
    codec = ready(lively(WITH_CODEC[name]))
    decoded = decode(codec, encode(codec, picture(64, 100)))
    assert decoded.shape == (3, 64, 100)
    assert decoded.isfinite().all()


def test_a_model_file_decodes_what_the_converted_graph_encoded(x: Tensor, tmp_path: Path) -> None:
    gm = graph_of(small_model("mbt2018-mean"), x)
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    here, there = fmpq_fx.convert(gm), fmpq_fx.load_codec(tmp_path / "model.fmpq")
    data = encode(here, x[0])
    assert data == encode(there, x[0])
    assert torch.equal(decode(there, data), decode(here, data))


@pytest.mark.parametrize("change", ["g_a.0.bias", "h_s.0.weight", "entropy_bottleneck._quantized_cdf"])
def test_another_model_is_refused_by_name(change: str) -> None:
    other = ready(small_model("bmshj2018-hyperprior"))
    other.state_dict()[change].view(-1)[:1].add_(1)
    with pytest.raises(
        FmpqError, match=r"encoded with another model: with the ScaleHyperprior [0-9a-f]{16}, and this"
    ):
        decode(other, DATA)


@pytest.mark.parametrize("length", range(len(DATA)))
def test_what_was_cut_off_is_refused(length: int) -> None:
    with pytest.raises(FmpqError, match=r"damaged|no .fmi file"):
        decode(CODEC, DATA[:length])


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_a_changed_byte_is_noticed(position: int, change: int) -> None:
    data = bytearray(DATA)
    data[position] ^= change
    with pytest.raises(FmpqError, match=r"damaged|no .fmi file|version"):
        decode(CODEC, bytes(data))


def test_more_bytes_are_noticed() -> None:
    with pytest.raises(FmpqError, match="checksum"):
        decode(CODEC, DATA + b"\0")
    body = DATA[9:] + b"\0"
    with pytest.raises(FmpqError, match="1 bytes too many"):
        decode(CODEC, sealed(body, DATA[4]))


def test_files_of_version_1_hold_strings_of_compressai() -> None:
    image = picture(64, 128)
    with torch.no_grad():
        coded = CODEC.compress(image[None])  # type: ignore[operator]
        expected = CODEC.decompress(coded["strings"], coded["shape"])["x_hat"]  # type: ignore[operator]
    data = of_version_1(64, 128, list(coded["shape"]), *(string for (string,) in coded["strings"]))
    assert torch.equal(decode(CODEC, data), expected[0].clamp(0, 1))


def test_a_newer_version_is_named() -> None:
    with pytest.raises(
        FmpqError, match=f"version {VERSION + 1} of the format.* reads up to version {VERSION}"
    ):
        decode(CODEC, sealed(DATA[9:], VERSION + 1))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (forged(height=2**32 - 1, width=2**32 - 1), "claims 4294967295 x 4294967295 pixels"),
        (forged(height=0), "claims 70 x 0 pixels"),
        (forged(shape=[10**9, 10**9]), "impossible shape"),
        (forged(shape=[-1, 2]), "impossible shape"),
        (forged(shape=[True, 2]), "impossible shape"),
        (forged(shape="x" * 200), "impossible shape"),
        (forged(shape={"y": [1.5]}), "impossible shape"),
        (forged(shape={"y": [[1, 2], [1, -2]]}), "impossible shape"),
        (forged(shape=[1, 2]), "cannot be decoded"),
        (forged(shape=[1, 2], strings=(b"", b"", b"")), "cannot be decoded"),
        (with_form("[null, null]"), "ends 4 bytes early"),
        (with_form("[[[7]]]"), "impossible form 7"),
        (with_form("[null"), "form of its strings is damaged"),
        (with_form("[" * 30_000 + "]" * 30_000), "form of its strings is damaged"),
        (with_form("[]"), "cannot be decoded"),
    ],
)
def test_a_forged_file_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(FmpqError, match=says):
        decode(CODEC, data)


def test_a_deeply_nested_shape_is_refused() -> None:
    depth = 30_000
    start = DATA[9:27] + counted(b"x", 1)
    with pytest.raises(FmpqError, match="shape of its latents is damaged"):
        decode(CODEC, sealed(start + counted(b"[" * depth + b"]" * depth, 2)))


@given(st.binary(max_size=300), st.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_strings_of_noise_give_an_image_or_an_error_but_no_crash(first: bytes, second: bytes) -> None:
    """CompressAI's decoder reads on where its string ends: that must not leave the memory that is its own."""
    for data in (forged(strings=(first, second)), of_version_1(40, 70, [1, 2], first, second)):
        with contextlib.suppress(FmpqError):
            assert decode(CODEC, data).shape == (3, 40, 70)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: encode(nn.Conv2d(1, 1, 1), picture(8, 8)), "Conv2d has no compress"),
        (lambda: decode(nn.Conv2d(1, 1, 1), DATA), "Conv2d has no compress"),
        (lambda: encode(CODEC, torch.rand(2, 3, 8, 8)), "pass one image"),
        (lambda: encode(CODEC, 255 * torch.ones(3, 8, 8)), "divide by 255"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], says: str) -> None:
    with pytest.raises((FmpqError, ValueError), match=says):
        make()


def test_a_reader_says_what_is_missing() -> None:
    reader = ByteReader(counted(b"abc", 2) + b"d")
    assert reader.take_counted(2) == b"abc"
    with pytest.raises(FmpqError, match="ends 1 bytes early"):
        reader.take(2)
    with pytest.raises(FmpqError, match="1 bytes too many"):
        reader.end()
    assert reader.rest() == b"d"
    reader.end()
