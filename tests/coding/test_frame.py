"""Frames: images of any size are coded by codecs that take only some."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.coding.codec import codec_of
from fmpq_fx.coding.frame import STRIDES, Frame, stride_of
from support.codecs.slices import Slices


class Wide(Slices):
    """Has windows that images of other sizes do not divide into."""

    def analysis(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 256 or x.shape[-1] % 256:
            raise RuntimeError("shape is invalid for input of size")
        y: Tensor = super().analysis(x)
        return y


def coded(cls: type) -> Any:
    torch.manual_seed(0)
    model = cls().eval()
    model.gaussian_conditional.update_scale_table(torch.logspace(-0.95, 2.4, 64).tolist())
    model.entropy_bottleneck.update()
    return model


def test_an_image_comes_back_from_its_frame() -> None:
    x = torch.rand(1, 3, 70, 129)
    for stride in STRIDES:
        frame = Frame(70, 129, stride)
        around = frame.around(x)
        assert around.shape[-2:] == frame.size
        assert all(side % stride == 0 for side in frame.size)
        assert torch.equal(frame.inside(around), x)


@pytest.mark.parametrize(("cls", "stride"), [(Slices, 64), (Wide, 256)])
def test_a_codec_gets_sizes_that_it_takes(cls: type, stride: int) -> None:
    model, image = coded(cls), torch.rand(3, 100, 300)
    assert stride_of(codec_of(model), 3) == stride
    assert fmpq_fx.decode(model, fmpq_fx.encode(model, image)).shape == image.shape
    (result,) = fmpq_fx.evaluate(model, {"x": image}, progress=False).images
    assert (result.height, result.width, result.deviation <= 1) == (100, 300, True)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels_are_told_from_those_that_a_codec_takes(channels: int) -> None:
    model, image = coded(Wide), torch.rand(channels, 64, 64)
    says = f"takes images of 3 channels, and these have {channels}"
    with pytest.raises(FmpqError, match=says):
        fmpq_fx.encode(model, image)
    with pytest.warns(UserWarning, match=f"one: the model {says}"), pytest.raises(FmpqError, match=says):
        fmpq_fx.evaluate(model, {"one": image}, progress=False)
    assert stride_of(codec_of(model), 3) == 256, "the mistake is not kept"


def test_a_gray_image_is_not_spread_over_the_steps_of_three_channels(
    prepared: fx.GraphModule,
) -> None:
    with pytest.raises(FmpqError, match="takes images of 3 channels, and these have 1"):
        fmpq_fx.encode(fmpq_fx.convert(prepared), torch.rand(1, 64, 64))


def test_a_codec_that_runs_on_nothing_says_so_of_the_image() -> None:
    class Never(Slices):
        def analysis(self, x: Tensor) -> Tensor:
            raise RuntimeError("never")

    with pytest.raises(RuntimeError, match="never"):
        fmpq_fx.encode(coded(Never), torch.rand(3, 64, 64))


class Large(Slices):
    """Runs out of memory at the least size that is tried, and at no other."""

    def analysis(self, x: Tensor) -> Tensor:
        if x.shape[-2] == STRIDES[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        y: Tensor = super().analysis(x)
        return y


def test_too_little_memory_does_not_make_another_stride() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        stride_of(codec_of(coded(Large)), 3)
