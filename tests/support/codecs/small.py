"""What the small codecs have in common: a mean-scale hyperprior that is four times down and four times up."""

from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import CompressionModel
from torch import Tensor, nn

N = 6  # channels of all feature maps


class Small(CompressionModel):
    """A codec of which others exchange what is between the image, the latents and their rounding.

    ::

        x -> analysis -> y ---------------------> coded -> y_hat -> synthesis -> x_hat
                         +-> h_a -> z_hat -> h_s -> ^
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g_a = nn.Sequential(down(3, N), nn.LeakyReLU(inplace=True), down(N, N))
        self.g_s = nn.Sequential(up(N, N), nn.ReLU(inplace=True), up(N, 3))
        self.h_a = down(N, N)
        self.h_s = nn.Sequential(up(N, 2 * N), nn.Conv2d(2 * N, 2 * N, 1))
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)

    def analysis(self, x: Tensor) -> Tensor:
        """Return the latents, large enough not to be all rounded to zero."""
        y: Tensor = self.g_a(x)
        return 8 * y

    def synthesis(self, y_hat: Tensor) -> Tensor:
        """Return the image."""
        x_hat: Tensor = self.g_s(y_hat)
        return x_hat

    def hyper(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rounded hyper-latents and their likelihoods."""
        z_hat, likelihoods = self.entropy_bottleneck(z)
        return z_hat, likelihoods

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rounded latents and their likelihoods."""
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat, likelihoods = self.gaussian_conditional(y, scales, means=means)
        return y_hat, likelihoods

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return the image and the likelihoods of its latents."""
        y = self.analysis(x)
        z_hat, z_likelihoods = self.hyper(self.h_a(y))
        y_hat, y_likelihoods = self.coded(y, z_hat)
        return {"x_hat": self.synthesis(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


def down(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, 2, 1)


def up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
