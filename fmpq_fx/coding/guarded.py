"""Code images so that they survive another machine, whatever the codec computes its CDFs with.

An exact codec does by itself. Any other has its CDFs guarded (:mod:`fmpq_fx.coding.guard`), by a margin that is
measured on every image::

    compress() ──► strings, scales ──► decompress() in other arithmetic, up to the last CDF ──► scales
        ▲                                                                                          │
        └──── again, with a larger margin, if four times the largest difference is beyond it ◄─────┘
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel
from torch import Tensor, nn

from fmpq_fx.coding.arithmetic import full_precision, other_kernels
from fmpq_fx.coding.choosers import GuardReader, GuardWriter, Rehearsal, Rehearsed
from fmpq_fx.coding.codec import Codec, with_settings
from fmpq_fx.coding.guard import LEAST_MARGIN, MOST_MARGIN, Guard
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.lower.entropy_path import compares_scales
from fmpq_fx.quant import QuantizedLayer, quantized_layers
from fmpq_fx.storage.rans import StringError

Robust = Literal["auto", "exact", "guarded"] | None
"""How an image survives another machine: "auto" is "exact" where the codec is, else "guarded"; None is not at all."""

_SAFETY = (
    4  # largest differences; that of two other machines may be twice what one arithmetic differs from another
)
_LEAST_GIVEN = 2.0**-24  # a margin; floats of 32 bits differ by more
_SIDE = 256  # pixels, of the part of an image that shows which layers are on the entropy path


class Kind(IntEnum):
    """How what was coded survives another machine."""

    NOT = 0
    EXACT = 1
    GUARDED = 2
    CHECKED = 3  # it may not, and then it is an error, not another image


@dataclass(frozen=True)
class Coded:
    """An image as a codec's ``compress()`` returns it, and what guards it."""

    strings: Any
    shape: Any
    kind: Kind
    guard: bytes = b""


def compress(codec: Codec, x: Tensor, robust: Robust = "auto", margin: float | None = None) -> Coded:
    """Return ``x`` coded.

    Args:
        codec: any.
        x: an image (1, C, H, W), in its dtype and on its device, padded as the codec wants it.
        robust: see :data:`Robust`.
        margin: how far the scales of another machine may be from these, as a part of them; None measures it.

    Raises:
        FmpqError: the codec cannot code in this way; the message says in which it can.
        ValueError: ``robust`` or ``margin`` is nothing of this.
    """
    kind = _kind(codec, robust, margin)
    if kind in (Kind.NOT, Kind.EXACT):
        coded = codec.compress(x)
        return Coded(coded["strings"], coded["shape"], kind)
    with full_precision(x.device):
        coded, writer, deviation = _guarded(codec, x, margin)
    kind = _kind_of(codec, writer, writer.strings >= len(coded["strings"]), deviation, robust)
    guard = b"" if kind is Kind.NOT else writer.guard.to_bytes()
    return Coded(coded["strings"], coded["shape"], kind, guard)


def _guarded(codec: Codec, x: Tensor, margin: float | None) -> tuple[Any, GuardWriter, float]:
    """Return what ``compress()`` made of ``x``, how its CDFs were chosen, and how far scales differ elsewhere."""
    path = _entropy_path(codec, x)
    now = LEAST_MARGIN if margin is None else margin
    while True:
        writer = GuardWriter(now, path)
        coded = with_settings(codec, chooser=writer).compress(x)
        deviation = _deviation(codec, coded, writer) if margin is None else 0.0
        if min(_SAFETY * deviation, MOST_MARGIN) <= now:
            return coded, writer, deviation
        now = min(MOST_MARGIN, 2.0 ** math.ceil(math.log2(_SAFETY * deviation)))


def _kind_of(codec: Codec, writer: GuardWriter, seen: bool, deviation: float, robust: Robust) -> Kind:
    """Return how what was coded survives another machine.

    Args:
        codec: that coded.
        writer: which chose the CDFs.
        seen: the symbols of all strings are in its checksum.
        deviation: of the scales in other arithmetic.
        robust: what was asked for.

    Raises:
        FmpqError: "guarded" was asked for, and it is not.
    """
    checked = seen or bool(writer.chosen)
    own = _own_models(codec)
    if own or not checked:
        named = ", ".join(own) or "of none of CompressAI's entropy models"
        why = f"they are chosen otherwise than by comparing scales: {named}"
    elif _SAFETY * deviation > writer.guard.margin:
        why = (
            f"their scales differ by {deviation:.2g} of their value from one arithmetic to another, maybe since "
            "something on the way to them is rounded"
        )
    else:
        return Kind.GUARDED
    text = f"the CDFs of this {type(codec).__name__} cannot be guarded: {why}"
    if robust == "guarded":
        raise FmpqError(f'{text}. Pass robust="auto" to code it all the same')
    result = "an error" if checked else "noise"
    warnings.warn(f"{text}. On another machine it may be decoded as {result}", stacklevel=4)
    return Kind.CHECKED if checked else Kind.NOT


def decompress(codec: Codec, coded: Coded, most: int) -> Tensor:
    """Return the image that is ``coded``, (1, C, H, W), as ``codec`` decodes it.

    Args:
        codec: any.
        coded: what :func:`compress` returned.
        most: symbols that there can be.

    Raises:
        FmpqError: the codec is another one than it was coded with, or it decoded something else; never an image then.
    """
    if coded.kind in (Kind.NOT, Kind.EXACT):
        if coded.kind is Kind.EXACT and not codec.fmpq.exact:
            raise FmpqError(
                "it was encoded by a codec in exact arithmetic, and this one computes in floating point; load it "
                "without exact=False"
            )
        try:
            decoded: Tensor = codec.decompress(coded.strings, coded.shape)["x_hat"]
        except StringError as error:
            raise FmpqError(
                f"its latents are not what was encoded ({error}): it was altered, or encoded with robust=None on a "
                "machine whose floats differ; encode it again"
            ) from error
        return decoded
    _check_dtype(codec)
    reader = GuardReader(Guard.from_bytes(coded.guard, most))
    with full_precision(next(codec.parameters()).device):
        try:
            decoded = with_settings(codec, chooser=reader).decompress(coded.strings, coded.shape)["x_hat"]
        except StringError as error:  # other CDFs were chosen than by the encoder
            raise FmpqError(reader.complaint()) from error
    reader.end()
    return decoded


def _kind(codec: Codec, robust: Robust, margin: float | None) -> Kind:
    if robust not in ("auto", "exact", "guarded", None):
        raise ValueError(f'robust is {robust!r}; pass "auto", "exact", "guarded" or None')
    if margin is not None and not _LEAST_GIVEN <= margin <= MOST_MARGIN:
        raise ValueError(
            f"margin is {margin}; pass a number from {_LEAST_GIVEN:.2g} to {MOST_MARGIN:.2g}, as a part of the scales, "
            "or None to measure it"
        )
    if robust is None:
        return Kind.NOT
    if codec.fmpq.exact:
        return Kind.EXACT
    if robust == "exact":
        raise FmpqError(
            f"this {type(codec).__name__} chooses its CDFs in floating point; convert() and load_codec() return one "
            'in exact arithmetic where there is such a form. Pass robust="guarded" otherwise'
        )
    _check_dtype(codec)
    return Kind.GUARDED


def _check_dtype(codec: Codec) -> None:
    dtype = next(codec.parameters()).dtype
    if dtype.itemsize < torch.float32.itemsize:
        raise FmpqError(
            f"CDFs that are chosen in {str(dtype).removeprefix('torch.')} cannot be guarded: there, scales differ by "
            "half a hundredth from one machine to another; use codec.float(), or pass robust=None to code for this "
            "machine alone"
        )


def _own_models(codec: nn.Module) -> list[str]:
    """Return the entropy models that choose CDFs otherwise than by a table of scales, or by the channel."""
    return [
        f"{name!r} ({type(module).__name__})"
        for name, module in codec.named_modules()
        if isinstance(module, EntropyModel)
        and not isinstance(module, EntropyBottleneck)
        and not compares_scales(module)
    ]


_PATHS: "WeakKeyDictionary[nn.Module, frozenset[str]]" = WeakKeyDictionary()


def _entropy_path(codec: Codec, x: Tensor) -> frozenset[str]:
    """Return the names of the layers with quantized inputs that run before the last CDF of ``x`` is chosen.

    They are found once for a codec, by coding a part of ``x``.
    """
    layers = [layer for layer in quantized_layers(codec).values() if layer.input_quantizer is not None]
    if not layers:
        return frozenset()
    known: QuantizedLayer = layers[0]  # which twins of a codec share
    if known not in _PATHS:
        try:
            _PATHS[known] = _path_seen(codec, x[..., :_SIDE, :_SIDE])
        except Exception:  # too small for it
            _PATHS[known] = _path_seen(codec, x)
    return _PATHS[known]


def _path_seen(codec: Codec, x: Tensor) -> frozenset[str]:
    writer = GuardWriter(LEAST_MARGIN, frozenset())
    coded = with_settings(codec, chooser=writer).compress(x)
    rehearsal = Rehearsal(writer.chosen)
    if writer.chosen:
        _rehearse(codec, coded, rehearsal)
    return frozenset(rehearsal.path)


def _deviation(codec: Codec, coded: Any, writer: GuardWriter) -> float:
    """Return by how much scales differ in another arithmetic, as a part of them."""
    for other in _others(codec) if writer.chosen else []:
        rehearsal = Rehearsal(writer.chosen)
        with other() as twin:
            _rehearse(twin, coded, rehearsal)
        if rehearsal.deviation > 0:
            return rehearsal.deviation
    return 0.0


def _others(codec: Codec) -> list[Callable[[], Any]]:
    """Return what gives ``codec`` in other arithmetic, to be tried until one computes something else."""
    parameter = next(codec.parameters())
    if parameter.dtype == torch.float64:
        return [lambda: _as_dtype(codec, torch.float32)]
    return [lambda: _by_other_kernels(codec, parameter.device), lambda: _as_dtype(codec, torch.float64)]


@contextmanager
def _by_other_kernels(codec: Codec, device: torch.device) -> Iterator[Codec]:
    with other_kernels(device):
        yield codec


@contextmanager
def _as_dtype(codec: Codec, dtype: torch.dtype) -> Iterator[Codec]:
    yield copy.deepcopy(codec).to(dtype)


def _rehearse(codec: Codec, coded: Any, rehearsal: Rehearsal) -> None:
    """Decode what is ``coded`` up to the last CDF.

    Raises:
        FmpqError: it cannot be decoded.
    """
    try:
        with_settings(codec, backend={}, chooser=rehearsal).decompress(coded["strings"], coded["shape"])
    except Rehearsed:
        return
    raise FmpqError(
        f"decompress() calls build_indexes otherwise than compress(): {rehearsal.calls} times and not "
        f"{len(rehearsal.chosen)} times"
    )
