"""Channel-conditional coding: slices of channels one after the other, each with the decoded ones before it."""

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

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales, means = self.h_s(z_hat).chunk(2, 1)
        decoded: list[Tensor] = []
        likelihoods = []
        for i, part in enumerate(y.chunk(SLICES, 1)):
            support = decoded if i < 2 else decoded[:2]
            mu = self.means[i](torch.cat([means, *support], dim=1))[:, :, : y.shape[2], : y.shape[3]]
            scale = self.scales[i](torch.cat([scales, *support], dim=1))
            likelihoods.append(self.gaussian_conditional(part, scale, mu)[1])
            decoded.append(quantize_ste(part - mu) + mu)
        assert len(decoded) == SLICES
        return torch.cat(decoded, 1), torch.cat(likelihoods, 1)
