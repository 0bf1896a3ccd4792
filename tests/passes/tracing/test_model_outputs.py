"""What is said where a model cannot run on images, and models that take other images than coloured ones."""

from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.passes.tracing.examples import synthetic
from fmpq_fx.passes.tracing.model_outputs import output_of
from support.small_models import small_model


class OfChannels(ScaleHyperprior):
    """A scale hyperprior of images that have 1 channel, or 4."""

    def __init__(self, channels: int):
        super().__init__(8, 12)
        self.g_a[0], self.g_s[-1] = conv(channels, 8), deconv(8, channels)


class Hungry(nn.Module):
    """A model that asks for more memory than a machine can address, or raises ``error``."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.inner, self.error = small_model("bmshj2018-hyperprior"), error

    def forward(self, x: Tensor) -> Any:
        if self.error is not None:
            raise self.error
        return self.inner(torch.cat((x, torch.empty(2**58))))


@pytest.mark.parametrize(
    "error", [None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]
)
def test_too_little_memory_is_said_to_be_that(error: Exception | None, x: Tensor) -> None:
    with pytest.raises(FmpqError, match=r"too little memory to run the model on 2 images of 64 x 64") as told:
        output_of(Hungry(error), x)
    assert "stride" not in str(told.value)
    assert "Pass smaller images" in str(told.value)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_told_from_small_ones(channels: int, x: Tensor) -> None:
    with pytest.raises(FmpqError, match=rf"takes images of {channels} channels?, and these have 3") as told:
        fmpq_fx.prepare(OfChannels(channels), 0.2, calibration=x)
    assert f"(…, {channels}, H, W)" in str(told.value)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_images_goes_all_the_way(channels: int) -> None:
    images = torch.rand(2, channels, 192, 192, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    gm = fmpq_fx.prepare(OfChannels(channels), 0.2, calibration=images[..., :64, :64], bits=[4, 6, 8])
    plan = fmpq_fx.plan_of(gm)
    assert plan.measured is not None
    assert len(plan.inputs) == len(plan.sites)
    history = fmpq_fx.finetune(gm, list(images), lmbda=0.01, steps=1, crop=64, workers=0)
    assert len(history.losses) == 1
    (image,) = fmpq_fx.evaluate(gm, {"one": images[0]}).images
    assert image.bpp > 0
    assert image.ms_ssim is not None
    codec = fmpq_fx.convert(gm)
    decoded = fmpq_fx.decode(codec, fmpq_fx.encode(codec, images[0]))
    assert decoded.shape == images[0].shape


class Large(nn.Module):
    """Runs out of memory on the first image that is tried, and on no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        if x.shape[-1] == 256:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        y = self.layer(x)
        return {"x_hat": y, "likelihoods": {"y": torch.sigmoid(y)}}


def test_too_little_memory_does_not_make_an_example_of_another_size() -> None:
    with pytest.raises(FmpqError, match="too little memory to run the model on 1 image of 256 x 256"):
        synthetic(Large())
