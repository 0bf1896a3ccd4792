"""An integer convolution in the form that ONNX Runtime runs fast: gather patches, multiply 8-bit matrices, scale.

ONNX Runtime's integer convolution is fast only if the output is rounded to 8 bits as well, which costs quality. Its
integer matrix product is no slower and returns float32, so that nothing else is rounded than in the quantized graph: it
is a MatMul with DequantizeLinear on both inputs, which become one kernel. Values have their channels last,
(B, H, W, C), so that the channels of one place are one block to copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmpq_fx.onnx.grids import RoundedInput, onnx_op
from fmpq_fx.quant.layers import QuantizedConv2d


class IntegerConvolution(nn.Module):
    """Rounds its input (B, C, H, W) to 8 bits and convolves it with the integers of ``layer``; the output is float32.

    Weights of more than 8 bits are two integers of 8 bits, a high and a low one, and take two products.
    """

    stored = "int8"

    @torch.no_grad()
    def __init__(self, layer: QuantizedConv2d):
        super().__init__()
        self.layer, self.grid = layer.layer, RoundedInput(layer, channel_dim=-1)
        self.pad_with = int(self.grid.zero_point.int())
        matrix = layer.weight_quantizer.integers(layer.float_weight()).permute(2, 3, 1, 0).flatten(0, 2)
        steps = layer.weight_quantizer.output_scale.float().flatten()
        parts = [(matrix, steps)]
        if layer.bits > 8:
            base = 2 ** (layer.bits - 7)
            high = torch.floor(matrix / base + 0.5)
            parts, self.stored = [(high, steps * base), (matrix - high * base, steps)], "int16"
        self.count = len(parts)
        for index, (integers, step) in enumerate(parts):
            self.register_buffer(f"matrix_{index}", integers.to(torch.int8).contiguous())
            self.register_buffer(f"step_{index}", step)
            self.register_buffer(f"zero_point_{index}", torch.zeros(len(step), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (B, C, H, W)."""
        patches = self.grid.dequantized(self._patches(self.grid.integers(x.permute(0, 2, 3, 1))))
        out = patches @ self._matrix(0)
        if self.count == 2:
            out = out + patches @ self._matrix(1)
        if self.layer.bias is not None:
            out = out + self.layer.bias
        return out.permute(0, 3, 1, 2)

    def _matrix(self, index: int) -> Tensor:
        inputs = tuple(self.get_buffer(f"{name}_{index}") for name in ("matrix", "step", "zero_point"))
        return onnx_op("DequantizeLinear", inputs, inputs[0], torch.float32, axis=1)

    def _patches(self, x: Tensor) -> Tensor:
        """Return the patch of ``x`` (B, H, W, C) that each output sees, (B, H', W', kH * kW * C)."""
        layer = self.layer
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        if any((left, right, top, bottom)):
            x = F.pad(x, (0, 0, left, right, top, bottom), value=self.pad_with)
        if layer.kernel_size == layer.stride == (1, 1):
            return x
        batch, height, width, channels = x.shape
        rows, columns = (self._places(size, axis) for axis, size in enumerate((height, width)))
        index = rows[:, None, :, None] * width + columns[None, :, None, :]  # (H', W', kH, kW)
        seen = x.reshape(batch, height * width, channels).index_select(1, index.flatten())
        # len() would be a plain number, which only fits the example.
        return seen.reshape(batch, rows.size(0), columns.size(0), -1)

    def _places(self, size: int, axis: int) -> Tensor:
        """Return the places, of ``size`` along a spatial ``axis``, that each output sees, (outputs, taps)."""
        layer = self.layer
        stride, dilation, kernel = layer.stride[axis], layer.dilation[axis], layer.kernel_size[axis]
        starts = torch.arange(0, size - dilation * (kernel - 1), stride)
        return starts[:, None] + torch.arange(kernel) * dilation
