"""A codec that names what it gives to its modules: ``self.conv(input=x)``."""

from compressai.layers import GDN, GDN1, MaskedConv2d
from torch import Tensor, nn

from support.codecs.small import N, Small, down, up


class Masked(nn.Conv2d):
    """A masked convolution of a user's own, with a name of its own for its input."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__(N, N, 3, padding=1)
        self.register_buffer("mask", (self.weight > 0).float())

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(features, self.weight * self.mask, self.bias)
        return out


class Named(Small):
    """Calls layers of all kinds by name, activations and entropy models as well."""

    def __init__(self) -> None:
        super().__init__()
        self.g_a, self.g_s = nn.Sequential(down(3, N)), nn.Sequential(up(N, 3))
        self.conv, self.masked, self.own = down(N, N), MaskedConv2d(N, N, 3, padding=1), Masked()
        self.gdn, self.inverse, self.linear = GDN(N), GDN1(N, inverse=True), nn.Linear(N, N)
        self.sized, self.act = nn.ConvTranspose2d(N, N, 3, 2, 1), nn.LeakyReLU(inplace=True)
        self.h_s = nn.Sequential(up(N, 2 * N))
        self.h_last = nn.Conv2d(2 * N, 2 * N, 1)

    def analysis(self, x: Tensor) -> Tensor:
        y = self.own(features=self.gdn(x=self.g_a(input=x)))
        y = self.act(input=self.conv(input=self.masked(x=y)))
        y = self.linear(input=y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        latents: Tensor = 12 * y
        return latents

    def synthesis(self, y_hat: Tensor) -> Tensor:
        height, width = y_hat.shape[-2:]
        y = self.inverse(x=self.sized(y_hat, output_size=(2 * height, 2 * width)))
        x_hat: Tensor = self.g_s(input=y)
        return x_hat

    def hyper(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z_hat, likelihoods = self.entropy_bottleneck(x=z)
        return z_hat, likelihoods

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales, means = self.h_last(input=self.act(input=self.h_s(input=z_hat))).chunk(2, 1)
        y_hat, likelihoods = self.gaussian_conditional(inputs=y, scales=scales, means=means)
        return y_hat, likelihoods
