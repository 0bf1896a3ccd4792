"""Convolutions that mask their weight in a forward of their own: the mask must survive quantization and training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmpq_fx.quant import quantize_layer, quantized_class


class _Masked(nn.Conv2d):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__(4, 6, 3, padding=1)
        self.register_buffer(
            "seen", (torch.arange(9) < 4).float().view(1, 1, 3, 3).expand(6, 4, 3, 3).clone()
        )


class Product(_Masked):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.seen, self.bias, padding=1)


class InPlace(_Masked):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.seen
        return super().forward(x)


class Other(_Masked):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", [Product, InPlace])
def test_masked_weights_stay_zero_whatever_is_trained(kind: type[_Masked]) -> None:
    torch.manual_seed(0)
    layer = kind()
    mask = layer.get_buffer("seen").bool()
    quantized = quantize_layer(layer, 6)
    x = torch.rand(2, 4, 8, 8)
    optimizer = torch.optim.SGD(quantized.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        quantized(x).square().sum().backward()
        optimizer.step()
    weight = quantized.weight
    assert weight[mask].any()
    assert not weight[~mask].any(), "a weight that the layer masks was trained, and multiplies"
    assert torch.equal(quantized(x), F.conv2d(x, weight, layer.bias, padding=1))


def test_a_forward_that_does_something_else_is_no_masked_convolution() -> None:
    assert quantized_class(Other()) is None
