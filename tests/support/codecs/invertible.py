"""Invertible blocks: what the analysis does, the synthesis undoes with the same layers."""

import torch
from torch import Tensor, nn

from support.codecs.small import N, Small


def squeezed(x: Tensor) -> Tensor:
    """Return ``x`` with half the sides and four times the channels."""
    b, c, h, w = x.size()
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return x.contiguous().view(b, c * 4, h // 2, w // 2)


def unsqueezed(x: Tensor) -> Tensor:
    """Undo :func:`squeezed`."""
    b, c, h, w = x.size()
    return x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


class Coupling(nn.Module):
    """One half is scaled and shifted by what the other one says."""

    def __init__(self, channels: int):
        super().__init__()
        self.kept = channels // 2
        self.scale, self.shift = (nn.Conv2d(self.kept, channels - self.kept, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        kept, other = torch.split(x, [self.kept, x.size(1) - self.kept], dim=1)
        scale = torch.exp(2 * torch.sigmoid(self.scale(kept)) - 1)
        other = (other - self.shift(kept)).div(scale) if reverse else other.mul(scale) + self.shift(kept)
        return torch.cat((kept, other), dim=1)


class Invertible(Small):
    """Squeezes and couples on both ways; channels that are too many are dropped, and zeros are put there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Coupling(channels) for channels in (12, 48))

    def analysis(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(squeezed(x))
        return 8 * x[:, :N]

    def synthesis(self, y_hat: Tensor) -> Tensor:
        b, c, h, w = y_hat.shape
        x = torch.cat((y_hat / 8, y_hat.new_zeros(b, 48 - c, h, w)), 1)
        for block in reversed(self.blocks):
            x = unsqueezed(block(x, reverse=True))
        return x
