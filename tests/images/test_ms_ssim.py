"""MS-SSIM in strips against pytorch_msssim, which takes the image as a whole."""

import pytest
import pytorch_msssim
import torch
from torch import Tensor, nn

from fmpq_fx.images import ms_ssim
from fmpq_fx.images.ms_ssim import LEAST_SIDE


def pair(height: int, width: int, noise: float, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Return two images of 8 bits, the second with noise, in float64."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, channels, 8, 8, generator=generator, dtype=torch.float64)
    x = 255 * nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    y = x + noise * torch.randn(x.shape, generator=generator)
    return x.round(), y.clamp(0, 255).round()


@pytest.mark.parametrize(("height", "width"), [(LEAST_SIDE, LEAST_SIDE), (163, 331), (400, 180), (161, 900)])
def test_strips_are_the_whole(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair(height, width, 20)
    taps = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (taps / taps.sum()).expand(3, 1, 1, -1)  # its own is of float32, and off by 5e-6 in the result
    expected = pytorch_msssim.ms_ssim(x, y, data_range=255, win=window).item()
    assert 0.1 < expected < 0.99
    found = []
    for strip in (1, 5000, 2**14, 2**30):
        monkeypatch.setattr(ms_ssim, "_STRIP", strip)
        found.append(ms_ssim.ms_ssim(x, y, 255).item())
    assert found == pytest.approx([expected] * 4, abs=1e-12)
    assert ms_ssim.ms_ssim(x.float(), y.float(), 255).item() == pytest.approx(expected, abs=1e-5)


def test_any_channels_and_peak() -> None:
    x, y = pair(200, 170, 30, channels=1)
    expected = pytorch_msssim.ms_ssim(x / 255, y / 255, data_range=1.0).item()
    assert ms_ssim.ms_ssim(x / 255, y / 255, 1).item() == pytest.approx(expected, abs=1e-5)
    assert ms_ssim.ms_ssim(x, x, 255).item() == 1


def test_images_of_a_batch_are_each_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    images, others = zip(*(pair(170, 200, noise) for noise in (2, 20, 60)), strict=True)
    each = [ms_ssim.ms_ssim(x, y, 255) for x, y in zip(images, others, strict=True)]
    assert torch.equal(ms_ssim.ms_ssim(torch.cat(images), torch.cat(others), 255), torch.cat(each))


def test_its_gradient_is_that_of_the_whole_and_finite_where_nothing_is_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = (z.float() / 255 for z in pair(170, 200, 20))
    monkeypatch.setattr(ms_ssim, "_STRIP", 5000)
    ours, theirs = y.clone().requires_grad_(), y.clone().requires_grad_()
    (1 - ms_ssim.ms_ssim(x, ours, 1.0)).sum().backward()
    (1 - pytorch_msssim.ms_ssim(x, theirs, data_range=1.0)).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.norm() > 0
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * theirs.grad.abs().max().item())
    opposite = (1 - x).requires_grad_()
    ms_ssim.ms_ssim(x, opposite, 1.0).sum().backward()
    assert opposite.grad is not None
    assert opposite.grad.isfinite().all()


def test_nothing_alike_is_zero() -> None:
    x, _ = pair(200, 200, 0)
    y = 255 - x
    assert pytorch_msssim.ms_ssim(x, y, data_range=255).item() == 0
    assert ms_ssim.ms_ssim(x, y, 255).item() == 0


def test_one_side_less_has_not_all_scales() -> None:
    x, y = pair(LEAST_SIDE - 1, 300, 5)
    with pytest.raises(AssertionError, match="larger than"):
        pytorch_msssim.ms_ssim(x, y, data_range=255)
