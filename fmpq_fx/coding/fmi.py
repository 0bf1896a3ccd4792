r"""Image files, ``.fmi``: the strings of a codec, with the fingerprint of the codec that decodes them.

Big-endian, in this order:

=========  ==============================================================================================
4 bytes    ``\x89FMI``
1 byte     version of the format
4 bytes    CRC-32 of all that follows
8 bytes    fingerprint of the model (:func:`fmpq_fx.coding.codec_fingerprint.fingerprint_of`)
4 + 4      height and width of the image, pixels
2 bytes    stride: the sides of the coded image are multiples of it (:class:`fmpq_fx.coding.frame.Frame`)
1 + n      name of the model's class, UTF-8
2 + n      shape of the latents for the codec's ``decompress()``, JSON
1 byte     how it survives another machine (:class:`fmpq_fx.coding.guarded.Kind`)
4 + n      its guard there (:class:`fmpq_fx.coding.guard.Guard`)
1 byte     number of strings; in version 3: 4 + n, the form in which they are nested, JSON
4 + n      each string, its length before it
=========  ==============================================================================================

A file has version 2 if the codec returns a list for each latent with one string in it, as CompressAI's models do. For
any other nest of strings it has version 3 (:mod:`fmpq_fx.coding.strings`).

From version 2 on, the strings of CompressAI's entropy models are those of :mod:`fmpq_fx.coding.array_model`. Others are
made by CompressAI's coder: if the codec's class calls that coder itself, or codes in exact loops. Version 1, which is
read as well, has only strings of CompressAI's coder, a stride of 64, and no guard.
"""

import itertools
import json
import math
import struct
import zlib
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fmpq_fx.coding import guarded
from fmpq_fx.coding.codec import Codec, codec_of, with_settings
from fmpq_fx.coding.codec_fingerprint import fingerprint_of
from fmpq_fx.coding.frame import STRIDES, Frame, stride_of
from fmpq_fx.coding.guarded import Coded, Kind, Robust
from fmpq_fx.coding.string_coder import padded
from fmpq_fx.coding.strings import flat, form_of, in_form
from fmpq_fx.coding.tiles import Size
from fmpq_fx.coding.tiling import latents_of, within
from fmpq_fx.errors import FmpqError
from fmpq_fx.images import reading
from fmpq_fx.storage.byte_reader import ByteReader, counted

MAGIC, VERSION = b"\x89FMI", 3

_START = struct.Struct(">4sBI")
_HEAD, _STRIDE = struct.Struct(">8sII"), struct.Struct(">H")
_MOST_LATENTS = 4  # per pixel; CompressAI's models have at most 1.3
_LARGE = 2**18  # pixels


def encode(
    codec: nn.Module,
    image: Tensor,
    *,
    robust: Robust = "auto",
    margin: float | None = None,
    memory: int | str | None = None,
) -> bytes:
    """Return ``image`` as the content of a ``.fmi`` file.

    Args:
        codec: a codec from :func:`fmpq_fx.load_codec` or :func:`fmpq_fx.convert`, or any model with CompressAI's
            ``compress``.
        image: (C, H, W) or (1, C, H, W) in [0, 1], of any size.
        robust: how the file survives another machine, whose floats differ in their last places. "exact": the codec
            computes its entropy path in integers. "guarded": a guard in the file makes another machine choose the same
            CDFs. "auto" is "exact" if the codec is exact, else "guarded". None does nothing: another machine may
            decode noise.
        margin: how far the scales of another machine may differ from those here, as a fraction of a scale, up to 2^-8;
            None measures it on ``image``.
        memory: the most memory to use besides the codec, in bytes or as "2GB"; None is a quarter of the machine's. An
            image that needs more is transformed in tiles (:func:`fmpq_fx.coding.tiling.within`).

    Raises:
        FmpqError: the codec cannot code, or not within the ``memory`` given, or not as ``robust`` says; the message
            says what is needed.
        TypeError, ValueError: ``image`` is no such tensor, or ``robust`` or ``margin`` is out of its range.
    """
    coder = codec_of(codec)
    batch = reading.checked(image, "the image")
    if len(batch) != 1:
        raise ValueError(f"the image has shape {tuple(image.shape)}; pass one image, (C, H, W)")
    parameter = next(coder.parameters())
    height, width = batch.shape[-2:]
    frame = Frame(height, width, stride_of(coder, batch.size(1)))
    tiled = with_settings(within(coder, frame.size, memory, images=2), arrays=True)
    with torch.no_grad():
        framed = frame.around(batch.to(parameter.device, parameter.dtype))
        coded = guarded.compress(tiled, framed, robust, margin)
    version, strings = _strings_to_bytes(coded.strings)
    parts = [
        _HEAD.pack(_fingerprint(coder), height, width),
        _STRIDE.pack(frame.stride),
        counted(type(coder).__name__.encode()[:255], 1),
        counted(json.dumps(_plain(coded.shape), separators=(",", ":")).encode(), 2),
        bytes([coded.kind]),
        counted(coded.guard, 4),
        strings,
    ]
    body = b"".join(parts)
    return _START.pack(MAGIC, version, zlib.crc32(body)) + body


def decode(codec: nn.Module, data: bytes, *, memory: int | str | None = None) -> Tensor:
    """Return the image in ``data``, (C, H, W), float32, in [0, 1], on the CPU.

    Args:
        codec: the codec that encoded it.
        data: the content of a ``.fmi`` file, which :func:`encode` returned.
        memory: as for :func:`encode`; it need not be the same.

    Raises:
        FmpqError: ``data`` is no ``.fmi`` file, damaged, of a newer version, or was encoded with another model, or
            decoding needs more than the ``memory`` given, or the decoded latents are not those that were encoded.
    """
    coder = codec_of(codec)
    version, body = _checked_body(data)
    reader = ByteReader(body)
    fingerprint_of_data, height, width = _HEAD.unpack(reader.take(_HEAD.size))
    stride = _STRIDE.unpack(reader.take(_STRIDE.size))[0] if version > 1 else STRIDES[0]
    name = reader.take_counted(1).decode(errors="replace")
    if fingerprint_of_data != _fingerprint(coder):
        raise FmpqError(
            f"it was encoded with another model: with the {name} {fingerprint_of_data.hex()}, and this is the "
            f"{type(coder).__name__} {_fingerprint(coder).hex()}; decode it with the file that it was encoded "
            f"with{_in_float32(coder)}"
        )
    limit = Image.MAX_IMAGE_PIXELS or 2**31
    if not 0 < height * width <= limit:
        raise FmpqError(f"it claims {width} x {height} pixels, and at most {limit} are decoded")
    if stride not in STRIDES:
        raise FmpqError(f"it is damaged: its sides are multiples of {stride}")
    frame = Frame(height, width, stride)
    pixels = math.prod(frame.size)
    shape = _shape(reader.take_counted(2), _MOST_LATENTS * pixels)
    kind, guard = _guard(reader) if version > 1 else (Kind.NOT, b"")
    symbols = _most_symbols(coder, frame.size)
    strings = _strings(reader, version, symbols)
    reader.end()
    tiled = with_settings(within(coder, frame.size, memory, images=3), arrays=version > 1)
    coded = Coded(strings, shape, kind, guard)
    try:
        with torch.no_grad():
            decoded = guarded.decompress(tiled, coded, symbols)
    except FmpqError:
        raise
    except Exception as error:  # a forged stream may make anything go wrong
        raise FmpqError(f"its strings cannot be decoded: {type(error).__name__}: {error}") from error
    if decoded.shape[-2:] != frame.size:
        raise FmpqError(f"its latents are not those of an image of {width} x {height} pixels")
    return frame.inside(decoded)[0].float().clamp(0, 1).cpu()


def _strings_to_bytes(strings: Any) -> tuple[int, bytes]:
    """Return the version of the format that can hold ``strings``, and the bytes of them."""
    all_strings, form = flat(strings), form_of(strings)
    if form == [[None]] * len(all_strings) and len(all_strings) < 256:
        version, start = 2, bytes([len(all_strings)])
    else:
        version, start = 3, counted(json.dumps(form, separators=(",", ":")).encode(), 4)
    return version, start + b"".join(counted(string, 4) for string in all_strings)


def _strings(reader: ByteReader, version: int, symbols: int) -> Any:
    """Take the bytes of :func:`_strings_to_bytes`; return the nest of strings, padded for ``symbols`` symbols each."""
    strings = (padded(reader.take_counted(4), symbols) for _ in itertools.count())
    try:
        form = [[None]] * reader.take(1)[0] if version < 3 else json.loads(reader.take_counted(4))
        return in_form(form, strings)
    except (ValueError, RecursionError) as error:
        raise FmpqError(f"the form of its strings is damaged: {error}") from error


def _fingerprint(codec: Codec) -> bytes:
    return bytes.fromhex(fingerprint_of(codec))[:8]


def _in_float32(codec: Codec) -> str:
    dtype = next(codec.parameters()).dtype
    if dtype.itemsize >= torch.float32.itemsize:
        return ""
    return f", in float32: in {str(dtype).removeprefix('torch.')} a codec computes with other numbers"


def _guard(reader: ByteReader) -> tuple[Kind, bytes]:
    kind, guard = reader.take(1)[0], reader.take_counted(4)
    if kind not in set(Kind):
        raise FmpqError(f"it is damaged: there is no way {kind} to survive another machine")
    return Kind(kind), guard


def _checked_body(data: bytes) -> tuple[int, bytes]:
    """Return the version of the format, and the bytes behind the checksum, which they match."""
    if data[: len(MAGIC)] != MAGIC:
        raise FmpqError("it is no .fmi file, as fmpq_fx.encode() and 'fmpq-fx encode' make it")
    if len(data) < _START.size:
        raise FmpqError(f"it is damaged: it ends after {len(data)} bytes")
    _, version, checksum = _START.unpack_from(data)
    if not 1 <= version <= VERSION:
        raise FmpqError(
            f"it has version {version} of the format, and this fmpq_fx reads up to version {VERSION}; install a newer "
            "one"
        )
    body = data[_START.size :]
    if zlib.crc32(body) != checksum:
        raise FmpqError("it is damaged: its checksum is not that of its content; get or encode it again")
    return version, body


def _most_symbols(codec: Codec, size: Size) -> int:
    """Return an upper bound on the symbols of a string of an image of ``size``."""
    most = _MOST_LATENTS * math.prod(size)
    if math.prod(size) > _LARGE:  # counting latents takes time, but a large bound would take memory
        with suppress(FmpqError):
            return min(most, 2 * latents_of(codec, size))
    return most


def _plain(shape: Any) -> Any:
    """Return the shape of latents as lists and dicts, for JSON."""
    if isinstance(shape, dict):
        return {key: _plain(value) for key, value in shape.items()}
    return [_plain(side) if isinstance(side, list | tuple) else side for side in shape]


def _shape(text: bytes, most: int) -> Any:
    """Return the shape in the JSON ``text``, after checking that it has at most ``most`` latents."""
    try:
        return _sizes(json.loads(text), most)
    except (ValueError, RecursionError) as error:
        raise FmpqError(f"the shape of its latents is damaged: {error}") from error


def _sizes(shape: Any, most: int) -> Any:
    if isinstance(shape, dict):
        return {key: _sizes(value, most) for key, value in shape.items()}
    if isinstance(shape, list) and shape and isinstance(shape[0], list):  # a shape for each group of channels
        return [_sizes(group, most) for group in shape]
    count = 1
    for side in shape if isinstance(shape, list) else [None]:
        if type(side) is not int or side < 1 or (count := count * side) > most:
            raise FmpqError(f"its latents have the impossible shape {str(shape)[:80]}")
    return torch.Size(shape)
