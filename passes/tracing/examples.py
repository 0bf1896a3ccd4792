"""Make images: to trace with where none are given, and of other sizes to check a graph with."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.tracing.model_outputs import output_of, ran_out_of_memory
from fmpq_fx.passes.tracing.wrappers import copied

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

CHANNELS = (3, 1, 4)
"""Numbers of channels that images may have, the likeliest first."""

_SHAPES: tuple[Shape, ...] = tuple((channels, side, side) for channels in CHANNELS for side in (256, 512, 64))
_STEPS = (64, 128, 32, 16, 256)  # sides may have to be multiples of these, the likeliest first


def synthetic(model: nn.Module, shape: Shape | None = None) -> Tensor:
    """Return an image (1, C, H, W), always the same, in [0, 1], that ``model`` can run on.

    Args:
        model: the image has its device and dtype.
        shape: the shape of the image. None tries several, 256 x 256 with 3 channels first.

    Raises:
        FmpqError: the model can run on none of the shapes that are tried.
    """
    if shape is not None:
        return _image(model, shape)
    failure: Exception | None = None
    for tried in _SHAPES:
        image = _image(model, tried)
        try:
            run_copy(model, image)
        except Exception as error:  # the user's code may raise anything
            if ran_out_of_memory(error):
                raise
            failure = failure or error
        else:
            return image
    raise FmpqError(
        f"the model cannot run on images of 256 x 256, nor of other sizes: {failure}"
    ) from failure


def _image(model: nn.Module, shape: Shape) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    coarse = torch.rand(1, shape[0], 8, 8, generator=torch.Generator().manual_seed(0), device="cpu")
    smooth = nn.functional.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)
    return smooth.clamp(0, 1).to(like.device, like.dtype)


def of_other_sizes(x: Tensor) -> Iterator[Tensor]:
    """Yield the first image of ``x``, (1, C, H, W), cropped or tiled to other sizes, whose sides differ."""
    height, width = x.shape[-2:]
    for step in _STEPS:
        for more in (-1, 1):
            size = height + more * step, width + 2 * more * step
            if min(size) > 0:
                rows, columns = (
                    torch.arange(new, device=x.device) % old
                    for new, old in zip(size, (height, width), strict=True)
                )
                yield x[:1, :, rows][..., columns].contiguous()


@torch.no_grad()
def run_copy(model: nn.Module, x: Tensor) -> dict[str, object]:
    """Return the output of ``model`` for ``x`` in evaluation; both are copied, since a forward may write to them."""
    return output_of(copied(model), x.clone())
