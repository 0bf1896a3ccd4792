"""A checkerboard: half of the places is the context of the other half, and items of feature maps are assigned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.codecs.small import N, Small


class MaskedInPlace(nn.Conv2d):
    """Writes zeros into its own weight whenever it runs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", checkered(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask  # type: ignore[arg-type]
        return super().forward(x)


class MaskedProduct(nn.Conv2d):
    """Convolves with the product of its weight and a mask."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("allowed", checkered(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.get_buffer("allowed")
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def checkered(weight: Tensor) -> Tensor:
    mask = torch.zeros_like(weight)
    mask[:, :, 0::2, 1::2] = 1
    mask[:, :, 1::2, 0::2] = 1
    return mask.detach()


class Checkerboard(Small):
    """Assigns to the items of feature maps, of a clone and of zeros."""

    context: type[nn.Conv2d] = MaskedInPlace

    def __init__(self) -> None:
        super().__init__()
        self.context_prediction = self.context(N, 2 * N, 5, padding=2)
        self.parameters_of_both = nn.Conv2d(4 * N, 2 * N, 1)

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        params = self.h_s(z_hat)
        anchors = torch.zeros_like(y)
        anchors[:, :, 0::2, 0::2] = y[:, :, 0::2, 0::2]
        anchors[:, :, 1::2, 1::2] = y[:, :, 1::2, 1::2]
        rounded = self.gaussian_conditional.quantize(anchors, "noise" if self.training else "dequantize")
        context = self.context_prediction(rounded)
        context[:, :, 0::2, 0::2] = 0
        context[:, :, 1::2, 1::2] *= 0
        scales, means = self.parameters_of_both(torch.cat((params, context), 1)).chunk(2, 1)
        y_hat, likelihoods = self.gaussian_conditional(y, scales, means=means)
        return y_hat, likelihoods


class MaskedByProduct(Checkerboard):
    """The same with the other way to mask a weight."""

    context = MaskedProduct
