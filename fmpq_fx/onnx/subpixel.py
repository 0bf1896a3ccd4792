"""Transposed convolutions as ordinary ones, whose outputs DepthToSpace puts in their places, with the same weights.

Runtimes have integer kernels for convolutions, and hardly any for transposed ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from fmpq_fx.onnx.grids import Dequantized, Float, RoundedInput, container, onnx_op
from fmpq_fx.onnx.integer_convolution import IntegerProducts
from fmpq_fx.quant import quantize_layer, quantized_class
from fmpq_fx.quant.layers import QuantizedConvTranspose2d
from fmpq_fx.quant.sub_positions import Kernel, convolve, kernels_of, surplus_of, work_together


def obstacle_to_lowering(gm: fx.GraphModule, site: str) -> str | None:
    """Return why :class:`Subpixel` cannot replace the module ``site`` of ``gm``; None if it can."""
    layer = gm.get_submodule(site)
    if QuantizedConvTranspose2d not in (type(layer), quantized_class(layer)):
        return "it is no transposed convolution"
    if len(set(_float_layer(layer).stride)) > 1:
        return "its strides differ"
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and node.target == site]
    if any(len(call.args) != 1 or call.kwargs for call in calls):
        return "it is called with more than its input"  # an output size decides how much a call pads
    return None


def _float_layer(layer: nn.Module) -> nn.ConvTranspose2d:
    found = layer.layer if isinstance(layer, QuantizedConvTranspose2d) else layer
    assert isinstance(found, nn.ConvTranspose2d)
    return found


class Subpixel(nn.Module, ABC):
    """Computes what a transposed convolution computes, at the resolution of its input."""

    def __init__(self, layer: nn.ConvTranspose2d):
        super().__init__()
        self.stride, self.outputs = layer.stride[0], layer.out_channels
        self.surplus = [surplus_of(layer, axis) for axis in (0, 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Upsample ``x`` (B, C, H, W) or (C, H, W)."""
        return self._shuffled(self.parts(x)) if x.ndim == 4 else self(x[None])[0]

    @abstractmethod
    def parts(self, x: Tensor) -> Tensor:
        """Return all sub-positions of the output for ``x`` (B, C, H, W) as channels, (B, S * S * out, H', W')."""

    def _shuffled(self, parts: Tensor) -> Tensor:
        if self.stride == 1:
            return parts
        batch, _, height, width = parts.shape
        shape = (batch, self.outputs, height * self.stride, width * self.stride)
        out = onnx_op("DepthToSpace", (parts,), shape, torch.float32, blocksize=self.stride, mode="DCR")
        rows, columns = (slice(None, -surplus or None) for surplus in self.surplus)
        return out[..., rows, columns]

    def kernels(self, weight: Tensor, layer: nn.ConvTranspose2d) -> Iterator[tuple[Kernel, int]]:
        """Yield the convolutions, and of how many sub-positions each is.

        Args:
            weight: the kernel of ``layer``, (out, in / groups, kH * kW).
            layer: the transposed convolution.
        """
        weight = weight.unflatten(2, layer.kernel_size)
        for kernel in kernels_of(weight, layer, work_together(layer) <= 1):
            yield kernel, kernel.weight.size(0) // self.outputs


class SubpixelConvolutions(Subpixel):
    """A transposed convolution, quantized or float, as convolutions."""

    @torch.no_grad()
    def __init__(self, layer: nn.Module):
        inner = _float_layer(layer)
        super().__init__(inner)
        self.grid: nn.Module = nn.Identity()
        self.convolutions = nn.ModuleList()
        if isinstance(layer, QuantizedConvTranspose2d):
            weight, quantizer = layer.integers, layer.weight_quantizer
            steps, dtype = quantizer.output_scale.float().flatten(), container(quantizer.low, quantizer.high)
            if layer.input_quantizer is not None:
                self.grid = RoundedInput(layer)
        else:
            quantized = quantize_layer(inner, 8)
            weight, steps = quantized.by_output(quantized.float_weight()), None
        for kernel, count in self.kernels(weight, inner):
            # Each has tensors of its own: runtimes treat those that several layers read differently.
            bias = None if inner.bias is None else inner.bias.repeat(count)
            held = (
                Float(kernel.weight)
                if steps is None
                else Dequantized(kernel.weight, steps.repeat(count), dtype)
            )
            self.convolutions.append(_Convolution(kernel, held, bias, inner.groups))

    def parts(self, x: Tensor) -> Tensor:
        """Return all sub-positions of the output."""
        x = self.grid(x)
        return torch.cat([convolution(x) for convolution in self.convolutions], 1)


class _Convolution(nn.Module):
    bias: Tensor | None

    def __init__(self, kernel: Kernel, weight: nn.Module, bias: Tensor | None, groups: int):
        super().__init__()
        self.weight, self.groups, self.dilation, self.pads = weight, groups, kernel.dilation, kernel.pads
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight(), self.bias, self.pads, self.dilation, self.groups)


class SubpixelProducts(Subpixel):
    """A quantized transposed convolution as integer products, in the form of ONNX Runtime."""

    @torch.no_grad()
    def __init__(self, layer: QuantizedConvTranspose2d):
        super().__init__(layer.layer)
        self.grid = RoundedInput(layer, channel_dim=-1)
        steps, bias = layer.weight_quantizer.output_scale.float().flatten(), layer.bias
        self.products = nn.ModuleList(
            IntegerProducts(
                self.grid,
                kernel.weight,
                steps.repeat(count),
                None if bias is None else bias.repeat(count),
                bits=layer.bits,
                dilation=kernel.dilation,
                pads=kernel.pads,
            )
            for kernel, count in self.kernels(layer.integers, layer.layer)
        )

    def parts(self, x: Tensor) -> Tensor:
        """Return all sub-positions of the output."""
        integers = self.grid.integers(x.permute(0, 2, 3, 1))
        return torch.cat([products(integers) for products in self.products], -1).permute(0, 3, 1, 2)
