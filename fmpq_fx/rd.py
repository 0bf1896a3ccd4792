"""The RD loss, rate + lmbda * 255^2 * MSE, and the sums it is made of.

Rate and lambda follow CompressAI: rate is in bits per pixel from the model's likelihoods, distortion is the
mean squared error of images in [0, 1], brought to the 0 … 255 scale by 255^2.
"""

import math
from collections.abc import Mapping
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
class RDSums:
    """What the RD loss over some images is made of."""

    bits: float = 0.0  # information content of all latents, bits
    squared_error: float = 0.0  # sum of squared errors of images in [0, 1]
    pixels: int = 0  # B * H * W
    elements: int = 0  # B * C * H * W

    @property
    def rate(self) -> float:
        """Bits per pixel."""
        return self.bits / self.pixels

    @property
    def mse(self) -> float:
        """Mean squared error of images in [0, 1]."""
        return self.squared_error / self.elements

    def rd(self, lmbda: float) -> float:
        """Return the RD loss, rate + lmbda * 255^2 * MSE."""
        return self.rate + lmbda * PEAK**2 * self.mse

    def __add__(self, other: "RDSums") -> "RDSums":
        return RDSums(
            self.bits + other.bits,
            self.squared_error + other.squared_error,
            self.pixels + other.pixels,
            self.elements + other.elements,
        )


def rd_sums(output: Mapping[str, Any], x: Tensor) -> RDSums:
    """Return the sums of a model's ``output`` for the images ``x``, (B, C, H, W) in [0, 1]."""
    bits = sum(total_bits(p).item() for p in output["likelihoods"].values())
    return RDSums(bits, squared_error(output["x_hat"], x).item(), x.numel() // x.size(1), x.numel())


def psnr(mse: float, peak: float = 1.0) -> float:
    """Return 10 * log10(peak^2 / mse) in dB, infinite where there is no error."""
    return 10 * math.log10(peak**2 / mse) if mse else math.inf


def rate_and_distortion(output: Mapping[str, Any], x: Tensor, lmbda: float) -> tuple[Tensor, Tensor]:
    """Return the two parts of the RD loss of a model's ``output`` for the images ``x``.

    Args:
        output: what a CompressAI model returns: ``x_hat`` and the dict ``likelihoods``.
        x: (B, C, H, W) images in [0, 1].
        lmbda: weight of the distortion.

    Returns:
        rate in bits per pixel and lmbda * 255^2 * MSE, both differentiable float64 scalars.
    """
    pixels = x.size(0) * x.size(-2) * x.size(-1)
    bits = torch.stack([total_bits(p) for p in output["likelihoods"].values()]).sum()
    return bits / pixels, lmbda * PEAK**2 * squared_error(output["x_hat"], x) / x.numel()
