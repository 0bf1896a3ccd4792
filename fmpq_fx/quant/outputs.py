"""Layers whose output lies on a grid of 8-bit integers too, as integer kernels leave it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmpq_fx.quant.layers import QuantizedGDN, QuantizedGDN1, QuantizedLayer

LAST = 255
"""The last integer of a grid; the first is 0."""


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``x`` (B, C, H, W) on the grid ``scale * (0 … 255 - zero_point)``, given per channel, (C,)."""
    scale, zero_point = scale.view(-1, 1, 1), zero_point.view(-1, 1, 1)
    integers = (x / scale + zero_point).round().clamp(0, LAST)
    return (integers - zero_point) * scale


class RoundedOutput(nn.Module):
    """A quantized convolution whose output is rounded, with a step and a zero point per channel.

    An integer convolution sums exactly and then leaves 8 bits. What is read in float afterwards (by a norm, or a
    residual) feels that rounding, which the graph that was trained does not have.

    Args:
        layer: the convolution.
        scale: steps of the output, (C,).
        zero_point: the integers that stand for 0, (C,), whole numbers from 0 to 255.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: QuantizedLayer, scale: Tensor, zero_point: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (B, C, H, W) and round."""
        return rounded(self.layer(x), self.scale, self.zero_point)


class IntegerNorm(nn.Module):
    """A quantized GDN whose norm is summed in integers: powers of the input and their weighed sums have 8 bits.

    Args:
        layer: the GDN.
        power_scale: step of the input's squares (GDN1: magnitudes), (1,).
        scale: steps of the weighed sums, (C,).
    """

    power_scale: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedGDN, power_scale: Tensor, scale: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("power_scale", power_scale)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (B, C, H, W)."""
        layer = self.layer.layer
        zero = torch.zeros_like(self.power_scale)
        weighed = weighed_powers(self.layer, rounded(powers(self.layer, x), self.power_scale, zero))
        # Beta is added after the rounding, so that the norm is never 0.
        beta = layer.beta_reparam(layer.beta).view(-1, 1, 1)
        norm = rounded(weighed, self.scale, torch.zeros_like(self.scale)) + beta
        root = norm if isinstance(self.layer, QuantizedGDN1) else norm.sqrt()
        out: Tensor = x * root if layer.inverse else x / root
        return out


def powers(layer: QuantizedGDN, x: Tensor) -> Tensor:
    """Return what the gamma of ``layer`` multiplies: squares of ``x``, or magnitudes."""
    return x.abs() if isinstance(layer, QuantizedGDN1) else x.square()


def weighed_powers(layer: QuantizedGDN, inputs: Tensor) -> Tensor:
    """Return the norm of ``layer`` without its beta, from the ``inputs`` that its gamma multiplies, (B, C, H, W)."""
    return F.conv2d(inputs, layer.weight[..., None, None])
