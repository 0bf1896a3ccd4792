"""Blocks of other architectures, and layers that a forward makes for the sizes it sees."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.codecs.small import N, Small


class LayerNorm(nn.Module):
    """Normalizes over channels, which come second or last."""

    def __init__(self, channels: int, channels_first: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        if not self.channels_first:
            return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-6)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (
            self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]
        )


class Block(nn.Module):
    """A ConvNeXt block, which drops its branch at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(N, N, 7, padding=3, groups=N), LayerNorm(N)
        self.wide, self.act, self.narrow = nn.Linear(N, 4 * N), nn.GELU(), nn.Linear(4 * N, N)
        self.gamma = nn.Parameter(torch.full((N,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        branch = self.gamma * self.narrow(self.act(self.wide(branch)))
        return x + dropped(branch.permute(0, 3, 1, 2), 0.3, self.training)


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    if probability == 0 or not training:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - probability)
    return x * kept.div_(1 - probability)


class ConvNeXt(Small):
    """ConvNeXt blocks with layer norms of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), LayerNorm(N, channels_first=True), Block())

    def analysis(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(super().analysis(x))
        return y


class MadeInside(Small):
    """Makes layers in its forward, and pads, resizes and scales by sizes that math and NumPy computed."""

    def synthesis(self, y_hat: Tensor) -> Tensor:
        h, w = y_hat.shape[-2:]
        rows, columns = int(np.ceil(h / 3)) * 3, math.ceil(int(w) / 3) * 3
        y_hat = nn.ReflectionPad2d((0, columns - w, 0, rows - h))(y_hat)
        low = nn.AdaptiveAvgPool2d((max(-(-rows // 2), 1), min(int(columns / 2), rows)))(y_hat)
        smooth = F.interpolate(low, size=(rows, columns), mode="bilinear", align_corners=False)
        scale = math.sqrt(float(rows * columns)) / round(0.5 * rows + 0.5 * columns)
        places = torch.arange(columns, dtype=y_hat.dtype, device=y_hat.device) / columns
        return super().synthesis((nn.Softplus()(y_hat) - scale * smooth + places)[:, :, :h, :w])
