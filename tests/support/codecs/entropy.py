"""Entropy models of a user's own: likelihoods from mixtures, and from torch.distributions."""

import torch
from torch import Tensor, nn
from torch.distributions import Laplace, Normal

from support.codecs.rounding import lower_bounded
from support.codecs.small import N, Small, up


class Mixture(Small):
    """A mixture of three normal distributions, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.h_s = nn.Sequential(up(N, 9 * N))

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        weights, means, scales = self.h_s(z_hat).chunk(3, 1)
        weights = weights.reshape(len(y), 3, N, *y.shape[2:]).softmax(1)
        means, scales = means.unflatten(1, (3, N)), lower_bounded(scales.unflatten(1, (3, N)), 0.11)
        y_hat = self.gaussian_conditional.quantize(y, "noise" if self.training else "dequantize")
        distance = (y_hat.unsqueeze(1) - means).abs()
        upper, lower = (0.5 * torch.erfc((distance - half) / scales / 2**0.5) for half in (0.5, -0.5))
        return y_hat, lower_bounded((weights * (lower - upper)).sum(1), 1e-9)


class Distributions(Small):
    """Distributions of torch, one of them made of sizes and types that the latents have."""

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales, means = self.h_s(z_hat).chunk(2, 1)
        scales = nn.functional.softplus(scales) + 0.1
        y_hat = self.gaussian_conditional.quantize(y, "noise" if self.training else "dequantize", means)
        normal = Normal(means, scales)
        zeros = torch.zeros(y.shape, device=y.device, dtype=y.dtype)
        laplace = Laplace(zeros, torch.ones_like(zeros) * 4)
        likelihoods = sum(0.5 * (d.cdf(y_hat + 0.5) - d.cdf(y_hat - 0.5)) for d in (normal, laplace))
        return y_hat, lower_bounded(likelihoods, 1e-9)
