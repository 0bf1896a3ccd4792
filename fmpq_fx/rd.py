"""The RD loss, rate + lmbda * distortion, and the sums it is computed from.

Rate and lambda follow CompressAI: rate is in bits per pixel from the model's likelihoods; distortion is the mean
squared error of images in [0, 1], brought to the 0 … 255 scale by 255^2, for models that were trained with it, and
1 - MS-SSIM for those that were trained with that (:mod:`fmpq_fx.images.distortions`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PEAK = 255.0


def total_bits(likelihoods: Tensor) -> Tensor:
    """Return the information content -sum(log2(p)) of ``likelihoods`` (any shape), a float64 scalar in bits."""
    return -likelihoods.log2().sum(dtype=torch.float64)


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return sum((x_hat - x)^2) of two tensors of equal shape, a float64 scalar."""
    return (x_hat - x).square().sum(dtype=torch.float64)


@dataclass(frozen=True)
class Distortion:
    """How far decoded images are from the original ones, on the scale that lambda weighs."""

    name: str  # "mse", "ms-ssim", or "module:function" of a user's function
    # Decoded and original images, both (B, C, H, W) -> a differentiable sum.
    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], int]  # images (B, C, H, W) -> the number of terms of that sum


MSE = Distortion("mse", lambda x_hat, x: PEAK**2 * squared_error(x_hat, x), Tensor.numel)
"""The mean squared error of images in [0, 1], times 255^2."""


@dataclass(frozen=True)
class RDSums:
    """The sums that the RD loss of some images is computed from."""

    bits: float = 0.0  # information content of all latents, bits
    error: float = 0.0  # sum of the distortion
    pixels: int = 0  # B * H * W
    count: int = 0  # number of terms of ``error``

    @property
    def rate(self) -> float:
        """Bits per pixel."""
        return self.bits / self.pixels

    @property
    def distortion(self) -> float:
        """Mean of the distortion, 255^2 * MSE for instance."""
        return self.error / self.count

    def rd(self, lmbda: float) -> float:
        """Return the RD loss, rate + lmbda * distortion."""
        return self.rate + lmbda * self.distortion

    def __add__(self, other: "RDSums") -> "RDSums":
        return RDSums(
            self.bits + other.bits,
            self.error + other.error,
            self.pixels + other.pixels,
            self.count + other.count,
        )


def rd_sums(output: Mapping[str, Any], x: Tensor, distortion: Distortion = MSE) -> RDSums:
    """Return the sums of a model's ``output`` for the images ``x``, (B, C, H, W) in [0, 1]."""
    bits = sum(total_bits(p).item() for p in output["likelihoods"].values())
    error = distortion.total(output["x_hat"], x).item()
    return RDSums(bits, error, x.numel() // x.size(1), distortion.count(x))


def psnr(mse: float, peak: float = 1.0) -> float:
    """Return 10 * log10(peak^2 / mse) in dB, infinite for an ``mse`` of 0."""
    return 10 * math.log10(peak**2 / mse) if mse else math.inf


def rate_and_distortion(
    output: Mapping[str, Any], x: Tensor, lmbda: float, distortion: Distortion = MSE
) -> tuple[Tensor, Tensor]:
    """Return the two parts of the RD loss of a model's ``output`` for the images ``x``.

    Args:
        output: the dict of a CompressAI model, with ``x_hat`` and the dict ``likelihoods``.
        x: (B, C, H, W) images in [0, 1].
        lmbda: weight of the distortion.
        distortion: the distortion that lmbda weighs.

    Returns:
        rate in bits per pixel and lmbda * distortion, both differentiable scalars, of float64 for the built-in ones.
    """
    pixels = x.size(0) * x.size(-2) * x.size(-1)
    bits = torch.stack([total_bits(p) for p in output["likelihoods"].values()]).sum()
    return bits / pixels, lmbda * distortion.total(output["x_hat"], x) / distortion.count(x)
