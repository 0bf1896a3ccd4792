"""The fingerprint of a codec, computed once and not for every image."""

import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fmpq_fx.coding.codec import Codec
from fmpq_fx.storage import fingerprint

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by bytes
_FINGERPRINTS: "WeakKeyDictionary[Codec, tuple[object, str]]" = WeakKeyDictionary()


def fingerprint_of(codec: Codec) -> str:
    """Return the digest of all that ``codec`` computes with; codecs of one fingerprint decode each other's files.

    In float64 a codec has the same fingerprint as in float32, and decodes the same files if it is exact or they are
    guarded. In half precision it computes with other numbers.
    """
    now = _state(codec)
    before, text = _FINGERPRINTS.get(codec, (None, ""))
    if now != before:
        double = next(codec.parameters()).dtype == torch.float64
        text = fingerprint.of_codec(copy.deepcopy(codec).float() if double else codec)
        _FINGERPRINTS[codec] = now, text
    return text


def _state(codec: Codec) -> object:
    """Return a value that changes whenever a parameter or a buffer of ``codec`` is changed or replaced."""
    return [(name, *_marks(value)) for name, value in codec.state_dict(keep_vars=True).items()]


def _marks(tensor: Tensor) -> tuple[object, ...]:
    # torch counts changes in place, but not those through .data, which change the sum of the bits.
    changes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.shape, changes, int(_as_integers(tensor).sum())


def _as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of ``tensor`` as integers, as wide as possible, because fewer add up faster."""
    flat = tensor.detach().reshape(-1)
    begins, ends = flat.itemsize * flat.storage_offset(), flat.nbytes
    return flat.view(next(dtype for size, dtype in _INTEGERS.items() if begins % size == ends % size == 0))
