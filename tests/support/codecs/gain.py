"""Variable rate: gain units scale latents, by a quality that is an argument of the forward."""

from typing import Any

import torch
from torch import Tensor, nn

from support.codecs.small import N, Small


class Gain(Small):
    """Interpolates between the gains of two qualities; its forward takes further arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.rand(4, N) + 0.5)
        self.inverse = nn.Parameter(torch.rand(4, N) + 0.5)

    def gain(self, table: Tensor, quality: int, between: float) -> Tensor:
        low, high = table[quality], table[min(quality + 1, len(table) - 1)]
        return (low.abs().clamp(min=1e-3) ** (1 - between) * high.abs() ** between).view(1, -1, 1, 1)

    def forward(
        self, x: Tensor, quality: int = 2, between: float = 0.25, clip: bool | None = None
    ) -> dict[str, Any]:
        y = self.analysis(x) * self.gain(self.gains, quality, between)
        z_hat, z_likelihoods = self.hyper(self.h_a(y))
        y_hat, y_likelihoods = self.coded(y, z_hat)
        x_hat = self.synthesis(y_hat * self.gain(self.inverse, quality, between))
        if clip is not None:
            x_hat = x_hat.clamp(0, 1)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}, "quality": quality}
