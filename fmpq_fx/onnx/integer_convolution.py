"""An integer convolution in the form that ONNX Runtime runs fast: gather patches, multiply 8-bit matrices, scale.

ONNX Runtime's integer convolution is fast only if the output is rounded to 8 bits as well, which costs quality. Its
integer matrix product is no slower and returns float32, so that nothing else is rounded than in the quantized graph: it
is a MatMul with DequantizeLinear on both inputs, which become one kernel. Values have their channels last,
(B, H, W, C), so that the channels of one place are one block to copy.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmpq_fx.onnx.grids import Dequantized, RoundedInput
from fmpq_fx.quant.layers import QuantizedConv2d


class IntegerProducts(nn.Module):
    """Convolves integers with integers.

    Weights of more than 8 bits are two integers of 8 bits, a high and a low one, and take two products.

    Args:
        grid: the grid of the input, which has its channels last.
        integers: the weight, (out, in, kH, kW).
        steps: the steps of the weight, (out,).
        bias: added to the output, (out,).
        bits: bits of the weight.
        stride: along rows and columns.
        dilation: along rows and columns.
        pads: places before and behind the columns, and before and behind the rows, as for ``F.pad``.
    """

    bias: Tensor | None

    def __init__(
        self,
        grid: RoundedInput,
        integers: Tensor,
        steps: Tensor,
        bias: Tensor | None,
        *,
        bits: int,
        stride: tuple[int, ...] = (1, 1),
        dilation: tuple[int, ...] = (1, 1),
        pads: Sequence[int] = (0, 0, 0, 0),
    ):
        super().__init__()
        self.grid, self.kernel = grid, integers.shape[2:]
        self.stride, self.dilation, self.pads = stride, dilation, pads
        self.pad_with = int(grid.zero_point.int())
        self.register_buffer("bias", bias)
        matrix = integers.permute(2, 3, 1, 0).flatten(0, 2)
        parts = [(matrix, steps)]
        if bits > 8:
            base = 2 ** (bits - 7)
            high = torch.floor(matrix / base + 0.5)
            parts = [(high, steps * base), (matrix - high * base, steps)]
        self.matrices = nn.ModuleList(Dequantized(part, step, torch.int8, 1) for part, step in parts)

    def forward(self, integers: Tensor) -> Tensor:
        """Convolve ``integers`` (B, H, W, in) of the grid; return float32 (B, H', W', out)."""
        patches = self.grid.dequantized(self._patches(integers))
        out: Tensor = patches @ self.matrices[0]()
        for matrix in self.matrices[1:]:
            out = out + patches @ matrix()
        return out if self.bias is None else out + self.bias

    def _patches(self, x: Tensor) -> Tensor:
        """Return the patch of ``x`` (B, H, W, C) that each output sees, (B, H', W', kH * kW * C)."""
        if any(self.pads):
            x = F.pad(x, (0, 0, *self.pads), value=self.pad_with)
        if self.kernel == self.stride == (1, 1):
            return x
        batch, height, width, channels = x.shape
        rows, columns = (self._places(size, axis) for axis, size in enumerate((height, width)))
        index = rows[:, None, :, None] * width + columns[None, :, None, :]  # (H', W', kH, kW)
        seen = x.reshape(batch, height * width, channels).index_select(1, index.flatten())
        # len() would be a plain number, which only fits the example.
        return seen.reshape(batch, rows.size(0), columns.size(0), -1)

    def _places(self, size: int, axis: int) -> Tensor:
        """Return the places, of ``size`` along a spatial ``axis``, that each output sees, (outputs, taps)."""
        dilation, kernel = self.dilation[axis], self.kernel[axis]
        starts = torch.arange(0, size - dilation * (kernel - 1), self.stride[axis])
        return starts[:, None] + torch.arange(kernel) * dilation


class IntegerConvolution(nn.Module):
    """Rounds its input to 8 bits and convolves it with the integers of ``layer``; the output is float32."""

    @torch.no_grad()
    def __init__(self, layer: QuantizedConv2d):
        super().__init__()
        self.grid = RoundedInput(layer, channel_dim=-1)
        self.products = IntegerProducts(
            self.grid,
            layer.weight_quantizer.integers(layer.float_weight()),
            layer.weight_quantizer.output_scale.float().flatten(),
            None if layer.bias is None else layer.bias.clone(),
            bits=layer.bits,
            stride=layer.layer.stride,
            dilation=layer.layer.dilation,
            pads=layer.layer._reversed_padding_repeated_twice,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (B, C, H, W)."""
        out: Tensor = self.products(self.grid.integers(x.permute(0, 2, 3, 1)))
        return out.permute(0, 3, 1, 2)
