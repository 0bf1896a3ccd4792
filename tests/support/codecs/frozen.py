"""Parts that are not trained: run without gradients, or cut off."""

import torch
from torch import Tensor, nn

from support.codecs.small import N, Small


class NoGradient(Small):
    """A branch that runs within torch.no_grad(), with a mask that is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(3, N, 4, 4), nn.Tanh())

    def analysis(self, x: Tensor) -> Tensor:
        y = super().analysis(x)
        with torch.no_grad():
            hint = self.frozen(x)
            mask = torch.zeros_like(hint)
            mask[:, ::2] = 1
            hint = hint * mask
        hinted: Tensor = y + 2 * hint
        return hinted


class Detached(Small):
    """Latents that the hyper path gets cut off, and data that is read past the gradients."""

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales, means = self.h_s(z_hat.detach()).chunk(2, 1)
        y_hat, likelihoods = self.gaussian_conditional(y, scales + y.data.abs() * 0.1, means=means)
        return y_hat, likelihoods
