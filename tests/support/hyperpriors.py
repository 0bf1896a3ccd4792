"""A user's hyperprior, whose hyper-synthesis ends with what a test chooses."""

from collections.abc import Callable
from typing import Any

import torch
from compressai.models import MeanScaleHyperprior
from torch import Tensor, nn

Between = Callable[[Any, Tensor], Tensor]


class Hyperprior(MeanScaleHyperprior):
    """A user's hyperprior: ``between`` comes between h_s and the entropy model, in coding as well.

    Args:
        between: from this model and scales and means (B, 24, H, W) to the same.
        parts: modules, parameters and buffers that the model has for it, by name.
    """

    def __init__(self, between: Between, **parts: nn.Module | Tensor):
        super().__init__(8, 12)
        torch.manual_seed(0)
        self.between = between
        self.h_s: nn.Module = nn.Sequential(self.h_s, _Between(self))
        self.offset = nn.Parameter(torch.full((1,), 0.3))
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


class _Between(nn.Module):
    def __init__(self, model: Hyperprior):
        super().__init__()
        self.model = [model]  # not as a submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.model[0].between(self.model[0], x)


class LatentsAdded(Hyperprior):
    """A hyperprior whose hyper-synthesis ends with the sum of its input and a layer's output."""

    def __init__(self, between: Between):
        super().__init__(between)
        self.h_s = _Added()


class _Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle, self.conv = nn.PixelShuffle(4), nn.ConvTranspose2d(8, 24, 4, 4)

    def forward(self, z_hat: Tensor) -> Tensor:
        shuffled = self.shuffle(z_hat.repeat(1, 2, 1, 1))
        return torch.add(self.conv(z_hat), torch.cat([shuffled] * 24, 1))


def hyperprior_of(channels: int) -> MeanScaleHyperprior:
    """Return a hyperprior for images of that many channels."""
    torch.manual_seed(0)
    model = MeanScaleHyperprior(8, 12)
    model.g_a[0] = nn.Conv2d(channels, 8, 5, 2, 2)
    model.g_s[-1] = nn.ConvTranspose2d(8, channels, 5, 2, 2, 1)
    return model.eval()
