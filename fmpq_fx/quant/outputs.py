"""A layer whose output lies on a grid of 8-bit integers too, as an integer kernel leaves it."""

from torch import Tensor, nn

from fmpq_fx.quant.layers import QuantizedLayer

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
