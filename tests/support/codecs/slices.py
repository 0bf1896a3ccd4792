"""Channel-conditional coding: slices of channels one after the other, each with the decoded ones before it."""

from typing import Any

import torch
from compressai.ops import quantize_ste
from torch import Tensor, nn

from support.codecs.small import N, Small

SLICES = 3


class Slices(Small):
    """A loop over slices, with lists, enumerate and rounding of the difference to the mean."""

    def __init__(self) -> None:
        super().__init__()
        width = N // SLICES
        self.means = nn.ModuleList(nn.Conv2d(N + i * width, width, 3, padding=1) for i in range(SLICES))
        self.scales = nn.ModuleList(nn.Conv2d(N + i * width, width, 3, padding=1) for i in range(SLICES))

    def hyper(self, z: Tensor) -> tuple[Tensor, Tensor]:
        medians = self.entropy_bottleneck._get_medians()
        return quantize_ste(z - medians) + medians, self.entropy_bottleneck(z)[1]

    def predict(self, i: int, h_s: Tensor, decoded: list[Tensor]) -> tuple[Tensor, Tensor]:
        scales, means = h_s.chunk(2, 1)
        support = decoded if i < 2 else decoded[:2]
        mu = self.means[i](torch.cat([means, *support], dim=1))[:, :, : h_s.shape[2], : h_s.shape[3]]
        return self.scales[i](torch.cat([scales, *support], dim=1)), mu

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        h_s, decoded, likelihoods = self.h_s(z_hat), list[Tensor](), []
        for i, part in enumerate(y.chunk(SLICES, 1)):
            scale, mu = self.predict(i, h_s, decoded)
            likelihoods.append(self.gaussian_conditional(part, scale, mu)[1])
            decoded.append(quantize_ste(part - mu) + mu)
        assert len(decoded) == SLICES
        return torch.cat(decoded, 1), torch.cat(likelihoods, 1)

    def compress(self, x: Tensor) -> dict[str, Any]:
        """Return the strings of z and of each slice."""
        y = self.analysis(x)
        z = self.h_a(y)
        strings = [self.entropy_bottleneck.compress(z)]
        h_s = self.h_s(self.entropy_bottleneck.decompress(strings[0], z.shape[2:]))
        decoded: list[Tensor] = []
        for i, part in enumerate(y.chunk(SLICES, 1)):
            scale, mu = self.predict(i, h_s, decoded)
            indexes = self.gaussian_conditional.build_indexes(scale)
            strings.append(self.gaussian_conditional.compress(part, indexes, mu))
            decoded.append(self.gaussian_conditional.quantize(part, "symbols", mu) + mu)
        return {"strings": strings, "shape": z.shape[2:]}

    def latents(self, strings: list[Any], shape: Any) -> Tensor:
        """Return the latents of ``strings``."""
        h_s = self.h_s(self.entropy_bottleneck.decompress(strings[0], shape))
        decoded: list[Tensor] = []
        for i, string in enumerate(strings[1:]):
            scale, mu = self.predict(i, h_s, decoded)
            indexes = self.gaussian_conditional.build_indexes(scale)
            decoded.append(self.gaussian_conditional.decompress(string, indexes, means=mu))
        return torch.cat(decoded, 1)

    def decompress(self, strings: list[Any], shape: Any) -> dict[str, Tensor]:
        """Return the image of ``strings``."""
        return {"x_hat": self.synthesis(self.latents(strings, shape))}
