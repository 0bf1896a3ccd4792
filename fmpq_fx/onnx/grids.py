"""Modules that export quantizers as QuantizeLinear and DequantizeLinear.

The layers compute as in torch, with these modules instead of their fake quantizers. All runtimes read this form, and
runtimes with integer kernels recognize by it the layers that these can run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmpq_fx.quant import QuantizedLayer

WIDEST = 16
"""The most bits of activations that ONNX can round to; with more bits, activations stay float."""

_CONTAINERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)


def container(low: int, high: int) -> torch.dtype:
    """Return the smallest integer type that holds ``low`` … ``high``."""
    return next(t for t in _CONTAINERS if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)


def onnx_op(
    op: str, inputs: tuple[Tensor, ...], shape: Sequence[int], dtype: torch.dtype, **attributes: Any
) -> Tensor:
    """Return the output of an ONNX operation, of that ``shape``; it has no values outside of an export."""
    out: Tensor = torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=shape)
    return out


class RoundedInput(nn.Module):
    """Divides the input of ``layer`` by the spread of its channels, if it has one, and rounds it to its grid.

    The weights of :class:`IntegerWeight` fit the divided input. Above 16 bits, the input is only divided.
    """

    step: Tensor
    zero_point: Tensor
    inverse: Tensor | None

    @torch.no_grad()
    def __init__(self, layer: QuantizedLayer, channel_dim: int | None = None):
        super().__init__()
        quantizer, spread = layer.input_quantizer, layer.weight_quantizer.log_spread
        assert quantizer is not None  # or there is no grid
        dim = layer.channel_dim if channel_dim is None else channel_dim
        inverse = None if spread is None else torch.exp(-spread).float().view(-1, *[1] * (-dim - 1))
        self.register_buffer("inverse", inverse)
        self.rounds = quantizer.bits <= WIDEST
        self.bits, self.dtype = quantizer.bits, container(0, quantizer.high)
        step, zero_point = quantizer.log_scale.exp(), quantizer.zero_point.round().clamp(0, quantizer.high)
        self.register_buffer("step", step.float().reshape(()))
        self.register_buffer("zero_point", zero_point.to(torch.int32).to(self.dtype).reshape(()))
        # The ends of the grid, at which inputs are clipped first: integers of 16 bits wrap around in OpenVINO. A grid
        # that fills 8 bits needs no clip, since QuantizeLinear saturates there.
        ends = [float((end - zero_point) * step) for end in (0, quantizer.high)]
        self.ends = None if quantizer.bits == 8 else ends

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``, of the same shape."""
        x = self._divided(x)
        x = x if self.ends is None else x.clamp(*self.ends)
        return onnx_op("QuantizeLinear", (x, self.step, self.zero_point), x.shape, self.dtype)

    def dequantized(self, integers: Tensor) -> Tensor:
        """Return the numbers of ``integers``, float32."""
        inputs = (integers, self.step, self.zero_point)
        return onnx_op("DequantizeLinear", inputs, integers.shape, torch.float32)

    def _divided(self, x: Tensor) -> Tensor:
        return x if self.inverse is None else x * self.inverse

    def forward(self, x: Tensor, log_spread: None = None) -> Tensor:
        """Return ``x`` divided by the spread, and rounded to the grid; ``log_spread`` is not used."""
        return self.dequantized(self.integers(x)) if self.rounds else self._divided(x)


class Dequantized(nn.Module):
    """Holds integers, with a step for each place of the dimension ``dim``, and returns their numbers in ONNX."""

    values: Tensor
    step: Tensor
    zero_point: Tensor

    def __init__(self, values: Tensor, step: Tensor, dtype: torch.dtype, dim: int = 0):
        super().__init__()
        self.dim = dim
        self.register_buffer("values", values.to(dtype).contiguous())
        self.register_buffer("step", step)
        self.register_buffer("zero_point", torch.zeros(len(step), dtype=dtype))

    def forward(self) -> Tensor:
        """Return the numbers, float32, in the shape of the integers."""
        inputs = (self.values, self.step, self.zero_point)
        return onnx_op("DequantizeLinear", inputs, self.values.shape, torch.float32, axis=self.dim)


class Float(nn.Module):
    """Holds numbers and returns them, as :class:`Dequantized` does."""

    values: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("values", values.contiguous())

    def forward(self) -> Tensor:
        """Return the numbers."""
        return self.values


class IntegerWeight(nn.Module):
    """Holds the integers of the weight of ``layer`` in the smallest type, and returns the dequantized weight."""

    log_spread = None  # RoundedInput divides the input by the spread

    @torch.no_grad()
    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        quantizer, weight = layer.weight_quantizer, layer.float_weight()
        shared = layer.shared_dims(weight)
        apart = [dim for dim in range(weight.ndim) if dim not in shared]
        # The dimensions with a step per element come first, flattened.
        self.order, self.sizes = (*apart, *shared), [weight.size(dim) for dim in apart]
        self.bits, dtype = quantizer.bits, container(quantizer.low, quantizer.high)
        integers = quantizer.integers(weight).permute(self.order).flatten(0, len(apart) - 1)
        self.dequantized = Dequantized(integers, quantizer.output_scale.float().flatten(), dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the dequantized weight; of the float ``weight`` only the number of dimensions is used."""
        found: Tensor = self.dequantized()
        if self.order == tuple(range(weight.ndim)):
            return found
        back = [self.order.index(dim) for dim in range(weight.ndim)]
        apart: Tensor = found.unflatten(0, self.sizes)
        return apart.permute(back)
