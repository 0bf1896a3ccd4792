"""Distortions: what lambda weighs is what CompressAI weighs, for images of any number and for functions of a user."""

from typing import Any

import pytest
import torch
from compressai.losses import RateDistortionLoss
from torch import Tensor

from fmpq_fx import FmpqError
from fmpq_fx.images.distortions import MS_SSIM, find_distortion
from fmpq_fx.rd import MSE, RDSums, rate_and_distortion, rd_sums
from support.finetuning import photos


def output(noise: float = 0.05, side: int = 192) -> tuple[dict[str, Any], Tensor]:
    """Return what a model might return for three images, and those."""
    x = torch.stack(photos(3, side))
    generator = torch.Generator().manual_seed(1)
    x_hat = x + noise * torch.randn(x.shape, generator=generator)
    likelihoods = {name: torch.rand(3, 4, 2, 2, generator=generator) for name in ("y", "z")}
    return {"x_hat": x_hat, "likelihoods": likelihoods}, x


def mean_difference(x_hat: Tensor, x: Tensor) -> Tensor:
    return 100 * (x_hat - x).abs().mean()


@pytest.mark.parametrize("name", ["mse", "ms-ssim"])
def test_the_rd_loss_is_that_of_compressai(name: str) -> None:
    out, x = output()
    distortion = find_distortion(name)
    lmbda = {"mse": 0.013, "ms-ssim": 16.64}[name]
    expected = RateDistortionLoss(lmbda, name)(out, x)["loss"].item()
    assert rd_sums(out, x, distortion).rd(lmbda) == pytest.approx(expected, rel=1e-5)
    rate, weighted = rate_and_distortion(out, x, lmbda, distortion)
    assert (rate + weighted).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", ["mse", "ms-ssim", mean_difference])
def test_sums_over_parts_are_the_whole(given: Any) -> None:
    out, x = output()
    distortion = find_distortion(given)
    parts = [
        {"x_hat": out["x_hat"][i], "likelihoods": {n: p[i] for n, p in out["likelihoods"].items()}}
        for i in (slice(0, 1), slice(1, 3))
    ]
    sums = rd_sums(parts[0], x[:1], distortion) + rd_sums(parts[1], x[1:], distortion)
    assert sums.rd(0.5) == pytest.approx(rd_sums(out, x, distortion).rd(0.5), rel=1e-6)


def test_a_function_is_the_distortion_that_it_returns() -> None:
    out, x = output()
    distortion = find_distortion(mean_difference)
    assert distortion.name == f"{__name__}:mean_difference"
    sums = rd_sums(out, x, distortion)
    assert sums.distortion == pytest.approx(mean_difference(out["x_hat"], x).item(), rel=1e-6)
    assert isinstance(sums, RDSums)
    x_hat = out["x_hat"].requires_grad_()
    distortion.total(x_hat, x).backward()
    assert x_hat.grad.count_nonzero() > 0


def test_what_is_recorded_is_taken_where_nothing_is_given() -> None:
    assert find_distortion(None) is MSE
    assert find_distortion(None, "ms-ssim") is MS_SSIM
    assert find_distortion("mse", "ms-ssim") is MSE
    with pytest.raises(ValueError, match=r"was my\.loss:lpips, a function of your own; pass it again"):
        find_distortion(None, "my.loss:lpips")


def test_what_is_no_distortion_is_refused() -> None:
    with pytest.raises(ValueError, match="distortion is 'ssim'; pass 'mse', 'ms-ssim', or a function"):
        find_distortion("ssim")
    with pytest.raises(TypeError, match="distortion is a int"):
        find_distortion(3)  # type: ignore[arg-type]
    out, x = output()
    with pytest.raises(ValueError, match=r"returned \(3, 3, 192, 192\); expected a tensor with one number"):
        rd_sums(out, x, find_distortion(lambda x_hat, x: x_hat - x))


def test_a_function_that_fails_is_named() -> None:
    def of_one(x_hat: Tensor) -> Tensor:
        return x_hat.mean()

    out, x = output()
    with pytest.raises(
        FmpqError, match=r"of_one failed on .*two tensors \(3, 3, 192, 192\): TypeError: .*takes 1"
    ):
        rd_sums(out, x, find_distortion(of_one))  # type: ignore[arg-type]


def test_small_images_are_refused() -> None:
    out, x = output(side=160)
    with pytest.raises(FmpqError, match="at least 161 x 161, got 160 x 160"):
        rd_sums(out, x, MS_SSIM)
