"""The frame around an image: a codec takes images whose sides are multiples of its stride."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from compressai.ops import compute_padding
from torch import Tensor, nn

from fmpq_fx.coding.codec import Codec
from fmpq_fx.coding.tiles import Size
from fmpq_fx.errors import FmpqError
from fmpq_fx.images.reading import CHANNELS
from fmpq_fx.passes.tracing.duplicates import duplicate
from fmpq_fx.passes.tracing.model_outputs import ran_out_of_memory, wrong_channels

STRIDES = (64, 128, 256, 512)
"""Strides that are tried: six strides of 2, as in most codecs, then more for deeper codecs and windowed attention."""


@dataclass(frozen=True)
class Frame:
    """An image of ``height`` x ``width`` pixels, padded on all sides to the next multiples of ``stride``."""

    height: int
    width: int
    stride: int = STRIDES[0]

    @property
    def size(self) -> Size:
        """Height and width of the padded image, which is coded."""
        return (-(-self.height // self.stride) * self.stride, -(-self.width // self.stride) * self.stride)

    def around(self, x: Tensor) -> Tensor:
        """Return ``x`` (…, height, width) with zeros around it."""
        return F.pad(x, self._padding[0])

    def inside(self, x: Tensor) -> Tensor:
        """Return the image inside ``x``, which has :attr:`size`."""
        return F.pad(x, self._padding[1])

    @property
    def _padding(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        padding: tuple[tuple[int, ...], tuple[int, ...]] = compute_padding(
            self.height, self.width, min_div=self.stride
        )
        return padding


_STRIDES: "WeakKeyDictionary[nn.Module, dict[int, int | None]]" = WeakKeyDictionary()  # by channels


def stride_of(codec: Codec, channels: int) -> int:
    """Return the least of :data:`STRIDES` that ``codec`` runs with on images of ``channels``; the first if none.

    Raises:
        FmpqError: it only runs on images of another number of channels.
    """
    found = _found(codec, channels)
    if found is None:
        takes = next((other for other in CHANNELS if _found(codec, other) is not None), None)
        if takes is not None:
            raise FmpqError(wrong_channels(takes, channels))
    return found or STRIDES[0]


def _found(codec: Codec, channels: int) -> int | None:
    """Return the least stride that ``codec`` runs with, found once for each model on black images."""
    known = _STRIDES.setdefault(next(codec.children()), {})  # all codecs of one model share this child
    if channels not in known:
        known[channels] = next((stride for stride in STRIDES if _runs(codec, channels, stride)), None)
    return known[channels]


@torch.no_grad()
def _runs(codec: Codec, channels: int, stride: int) -> bool:
    parameter = next(codec.parameters())
    image = parameter.new_zeros(1, channels, stride, 3 * stride)
    try:  # on a copy, since a model may keep masks for the last size
        return bool(duplicate(codec)(image)["x_hat"].shape == image.shape)
    except Exception as error:  # a user's model may raise anything; on the real image, its error is shown
        if ran_out_of_memory(error):
            raise
        return False
