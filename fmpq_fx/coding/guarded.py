"""Code images so that another machine decodes them, with exact codecs and others.

Images of an exact codec need no more. Those of any other codec get a guard (:mod:`fmpq_fx.coding.guard`), with a margin
that is measured on every image::

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
from fmpq_fx.coding.strings import flat
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.lower.entropy_path import compares_scales
from fmpq_fx.passes.tracing.model_outputs import ran_out_of_memory
from fmpq_fx.quant import QuantizedLayer, quantized_layers
from fmpq_fx.storage.rans import StringError

Robust = Literal["auto", "exact", "guarded"] | None
"""How an image survives another machine: "auto" is "exact" if the codec is exact, else "guarded"; None: not at all."""

_SAFETY = 4  # the margin in units of the measured difference; two machines may differ more than two arithmetics here
_LEAST_GIVEN = 2.0**-24  # the least margin; the rounding of float32 makes larger differences
_SIDE = 256  # pixels; side of the part of an image on which the entropy path is found


class Kind(IntEnum):
    """How a coded image survives another machine."""

    NOT = 0
    EXACT = 1
    GUARDED = 2
    CHECKED = 3  # it may not survive, but then decoding is an error, and never returns a wrong image


@dataclass(frozen=True)
class Coded:
    """An image as a codec's ``compress()`` returns it, and its guard."""

    strings: Any  # a list of strings (one per image) for each latent, from CompressAI's models
    shape: Any  # the shape of the latents, for ``decompress()``
    kind: Kind
    guard: bytes = b""


def compress(codec: Codec, x: Tensor, robust: Robust = "auto", margin: float | None = None) -> Coded:
    """Encode ``x``.

    Args:
        codec: any codec.
        x: an image (1, C, H, W), in the codec's dtype, on its device, padded to its stride.
        robust: see :data:`Robust`.
        margin: how far the scales of another machine may differ from these, as a fraction of a scale; None measures it.

    Raises:
        FmpqError: the codec cannot code in this way; the message says in which way it can.
        ValueError: ``robust`` or ``margin`` is out of its range.
    """
    kind = _asked_kind(codec, robust, margin)
    if kind in (Kind.NOT, Kind.EXACT):
        coded = codec.compress(x)
        return Coded(coded["strings"], coded["shape"], kind)
    with full_precision(x.device):
        coded, writer, deviation = _guarded(codec, x, margin)
    kind = _achieved_kind(codec, writer, writer.strings >= len(flat(coded["strings"])), deviation, robust)
    guard = b"" if kind is Kind.NOT else writer.guard.to_bytes()
    return Coded(coded["strings"], coded["shape"], kind, guard)


def _guarded(codec: Codec, x: Tensor, margin: float | None) -> tuple[Any, GuardWriter, float]:
    """Return the result of ``compress()`` for ``x``, its chooser, and how far scales differ in other arithmetic."""
    path = _entropy_path(codec, x)
    now = LEAST_MARGIN if margin is None else margin
    while True:
        writer = GuardWriter(now, path)
        coded = with_settings(codec, chooser=writer).compress(x)
        deviation = _deviation(codec, coded, writer) if margin is None else 0.0
        if min(_SAFETY * deviation, MOST_MARGIN) <= now:
            return coded, writer, deviation
        now = min(MOST_MARGIN, 2.0 ** math.ceil(math.log2(_SAFETY * deviation)))


def _achieved_kind(codec: Codec, writer: GuardWriter, seen: bool, deviation: float, robust: Robust) -> Kind:
    """Return how the coded image survives another machine.

    Args:
        codec: the codec that encoded it.
        writer: the chooser of its CDFs.
        seen: whether the checksum of ``writer`` has the symbols of all strings.
        deviation: the difference of scales in other arithmetic, as a fraction.
        robust: the option of :func:`compress`.

    Raises:
        FmpqError: "guarded" was asked for, and is not reached.
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
    """Decode ``coded`` with ``codec``; return the image, (1, C, H, W).

    Args:
        codec: the codec that encoded it.
        coded: the result of :func:`compress`.
        most: the largest possible number of symbols.

    Raises:
        FmpqError: the codec is another one, or the decoded latents are not those that were encoded.
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


def _asked_kind(codec: Codec, robust: Robust, margin: float | None) -> Kind:
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
    """Return the entropy models that choose CDFs neither by a table of scales nor by the channel."""
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

    They are found once for each codec, by coding a part of ``x``.
    """
    layers = [layer for layer in quantized_layers(codec).values() if layer.input_quantizer is not None]
    if not layers:
        return frozenset()
    known: QuantizedLayer = layers[0]  # twins of a codec share it
    if known not in _PATHS:
        try:
            _PATHS[known] = _path_seen(codec, x[..., :_SIDE, :_SIDE])
        except Exception as error:  # the part is too small for the codec
            if ran_out_of_memory(error):
                raise
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
    """Return the largest difference of scales in another arithmetic, as a fraction of a scale."""
    for other in _others(codec) if writer.chosen else []:
        rehearsal = Rehearsal(writer.chosen)
        with other() as twin:
            _rehearse(twin, coded, rehearsal)
        if rehearsal.deviation > 0:
            return rehearsal.deviation
    return 0.0


def _others(codec: Codec) -> list[Callable[[], Any]]:
    """Return contexts of ``codec`` in other arithmetic, to be tried until one gives different scales."""
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
    """Decode ``coded`` up to the last CDF.

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
