"""Random graphs of the layers that images go through."""

import random

import torch
import torch.nn.functional as F
from compressai.layers import GDN
from torch import Tensor, nn


class Residual(nn.Module):
    """Two branches, added or side by side."""

    def __init__(self, a: nn.Module, b: nn.Module, join: str):
        super().__init__()
        self.a, self.b, self.join = a, b, join

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.join == "cat":
            return torch.cat((a, F.relu(b)), 1)[:, :4]
        joined: Tensor = a * torch.sigmoid(b) + 1
        return joined


def random_layer(choose: random.Random) -> nn.Module:
    kernel, stride, dilation = choose.randint(1, 5), choose.randint(1, 3), choose.randint(1, 2)
    padding = choose.randint(0, 3)
    kind = choose.choice(
        ("conv", "deconv", "shuffle", "unshuffle", "pool", "act", "residual", "pad", "chunk")
    )
    if kind == "conv":
        lopsided = (kernel, choose.randint(1, 3))
        return nn.Conv2d(4, 4, lopsided, (stride, 1), (padding, 1), (dilation, 1))
    if kind == "deconv":
        extra = choose.randint(0, max(stride, dilation) - 1)
        return nn.ConvTranspose2d(
            4, 4, kernel, stride, choose.randint(0, kernel // 2), extra, 1, True, dilation
        )
    if kind == "shuffle":
        return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2))
    if kind == "unshuffle":  # of an even number of places alone
        return nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.PixelUnshuffle(2), nn.Conv2d(16, 4, 1))
    if kind == "pool":
        return choose.choice((nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2, 1)))
    if kind == "act":
        return choose.choice((nn.LeakyReLU(), GDN(4), nn.Sigmoid()))
    if kind == "pad":
        return nn.ZeroPad2d((2, 1, 3, 0))
    near = nn.Conv2d(4, 4, kernel | 1, 1, (kernel | 1) // 2)
    return Residual(near, nn.Conv2d(4, 4, 1), choose.choice(("cat", "times")))


def random_module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    choose = random.Random(seed)
    return nn.Sequential(*(random_layer(choose) for _ in range(choose.randint(1, 4)))).eval()
