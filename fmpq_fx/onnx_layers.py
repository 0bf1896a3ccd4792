"""The ONNX form of layers: integer convolutions as QuantizeLinear and DequantizeLinear around a Conv, and GDN.

ONNX Runtime makes one integer kernel of DequantizeLinear, Conv, QuantizeLinear. A kernel has one output step. Where
there is one per channel, it goes into the steps of the weights: the convolution then computes in steps of its
output, and the DequantizeLinear behind it has the steps. Layers that run in float multiply with the dequantized
weights; they are stored as integers, too, and multiplied by their steps when the graph is loaded.
"""

from typing import Any

import numpy as np
import torch
from compressai.layers import GDN, GDN1, MaskedConv2d
from torch import Tensor, fx, nn

from fmpq_fx.onnx_graph import Array, OnnxGraph, Rounded, failed, package
from fmpq_fx.passes.subpixel import Axis, original_weight
from fmpq_fx.quant import ActivationFakeQuant, QuantizedLayer
from fmpq_fx.quant.layers import (
    QuantizedConvTranspose2d,
    QuantizedGDN,
    QuantizedGDN1,
    QuantizedLinear,
)
from fmpq_fx.quant.outputs import RoundedOutput

WIDEST = 16
"""Bits of activations that ONNX can round to; more are as good as float."""

_MIDDLE = 128  # the zero point of a grid of 8 bits that is shifted per channel
_PADDING = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def rounded_input(graph: OnnxGraph, quantizer: ActivationFakeQuant | None, x: str) -> str:
    """Return ``x`` on the grid of ``quantizer``."""
    if quantizer is None or quantizer.bits > WIDEST:
        return x
    scale, zero_point = grid_of(quantizer)
    known = graph.rounded.get(x)
    if known is not None and np.all(known.scale == scale) and np.all(known.zero_point == zero_point):
        return x
    container = np.uint8 if quantizer.bits <= 8 else np.uint16
    if quantizer.high < np.iinfo(container).max:
        # Before rounding, where it does not stand between the nodes that make an integer kernel.
        ends = [(end - zero_point) * scale for end in (0, quantizer.high)]
        x = graph.add("Clip", [x, *(graph.constant(np.float32(end)) for end in ends)])
    grid = [graph.constant(scale, "scale"), graph.constant(container(zero_point), "zero_point")]
    return graph.add("DequantizeLinear", [graph.add("QuantizeLinear", [x, *grid]), *grid])


def grid_of(quantizer: ActivationFakeQuant) -> tuple[np.float32, int]:
    """Return step and zero point of ``quantizer``."""
    zero_point = quantizer.zero_point.detach().round().clamp(0, quantizer.high)
    return np.float32(quantizer.log_scale.detach().exp().item()), int(zero_point.item())


def convolution(graph: OnnxGraph, node: fx.Node, layer: Any, x: str) -> str:
    """Convolve ``x`` with a ``layer`` that is float or runs in float."""
    inner: Any = layer.layer if isinstance(layer, QuantizedLayer) else layer
    if isinstance(layer, QuantizedLayer):
        x = rounded_input(graph, layer.input_quantizer, x)
    inputs = [x, _float_weight(graph, node, layer), *_bias(graph, node, inner.bias)]
    if isinstance(inner, nn.ConvTranspose2d):
        if len(node.args) > 1 or node.kwargs:
            raise failed(node, "its output size is an argument of its call")
        pads, extra = [*map(int, inner.padding)] * 2, list(inner.output_padding)
        return graph.add(
            "ConvTranspose", inputs, node.name, pads=pads, output_padding=extra, **_geometry(inner)
        )
    inputs[0], pads = _padded(graph, node, inner, x)
    return graph.add("Conv", inputs, node.name, pads=pads, **_geometry(inner))


def integer_convolution(graph: OnnxGraph, node: fx.Node, rounded: RoundedOutput, x: str) -> str:
    """Convolve ``x`` in integers; the output is on the grid of ``rounded``."""
    layer: Any = rounded.layer
    x_scale, _ = grid_of(layer.input_quantizer)
    x = rounded_input(graph, layer.input_quantizer, x)
    weight, weight_scale = _spread_weight(graph, node, layer)
    scale, zero_point = (t.cpu().numpy() for t in (rounded.scale, rounded.zero_point))
    bias = np.zeros_like(scale) if layer.layer.bias is None else layer.layer.bias.detach().cpu().numpy()
    attributes = {"pads": _padded(graph, node, layer.layer, x)[1], **_geometry(layer.layer)}
    if np.ptp(scale) == np.ptp(zero_point) == 0:
        out = _integer_conv(
            graph, node.name, x, x_scale, weight, weight_scale, bias, scale[0], zero_point[0], attributes
        )
    else:
        steps = bias / scale + zero_point - _MIDDLE
        out = _integer_conv(
            graph, node.name, x, x_scale, weight, weight_scale / scale, steps, 1.0, _MIDDLE, attributes
        )
    return dequantized(graph, Rounded(out, scale, zero_point))


def dequantized(graph: OnnxGraph, value: Rounded) -> str:
    """Return the float value of integers, and remember where it came from."""
    uniform = np.ptp(value.scale) == np.ptp(value.zero_point) == 0
    scale, zero_point = value.scale.astype(np.float32), value.zero_point.astype(np.uint8)
    grid = [scale[0], zero_point[0]] if uniform else [scale, zero_point]
    inputs = [value.integers, graph.constant(grid[0], "scale"), graph.constant(grid[1], "zero_point")]
    out = graph.add("DequantizeLinear", inputs, axis=1)  # which counts only where there are several steps
    graph.rounded[out] = value
    return out


def unfused(graph: OnnxGraph, x: str) -> str:
    """Return ``x`` so that ONNX Runtime makes no integer operation of what reads it.

    It would, of additions, activations and others, and fail, since these have one step for all channels.
    """
    value = graph.rounded.get(x)
    if value is None or np.ptp(value.scale) == np.ptp(value.zero_point) == 0:
        return x
    one = [graph.constant(np.float32(1), "scale"), graph.constant(np.uint8(0), "zero_point")]
    counts = graph.add("DequantizeLinear", [value.integers, *one])
    scale, zero_point = (
        grid.astype(np.float32).reshape(-1, 1, 1) for grid in (value.scale, value.zero_point)
    )
    scaled = graph.add("Mul", [counts, graph.constant(scale)])
    return graph.add("Sub", [scaled, graph.constant(scale * zero_point)])


def _integer_conv(
    graph: OnnxGraph,
    name: str,
    x: str,
    x_scale: np.float32,
    weight: str,
    weight_scale: Array,
    bias: Array,
    scale: float,
    zero_point: float,
    attributes: dict[str, Any],
) -> str:
    """Return the integers (uint8) of a convolution whose output has one ``scale`` and ``zero_point``.

    Weights and bias are dequantized per output channel; a bias is counted in the products' steps, int32.
    """
    wide = np.iinfo(np.int32)
    steps = (x_scale * weight_scale).astype(np.float32)
    counted = np.clip(np.round(bias / steps.astype(np.float64)), wide.min, wide.max).astype(np.int32)
    scales = graph.constant(weight_scale.astype(np.float32), f"{name}.weight_scale")
    w = graph.add("DequantizeLinear", [weight, scales], axis=0)
    b = graph.add("DequantizeLinear", [graph.constant(counted), graph.constant(steps)], axis=0)
    out = graph.add("Conv", [x, w, b], name, **attributes)
    grid = [graph.constant(np.float32(scale), "scale"), graph.constant(np.uint8(zero_point), "zero_point")]
    return graph.add("QuantizeLinear", [out, *grid])


def linear(graph: OnnxGraph, node: fx.Node, layer: Any, x: str) -> str:
    """Map the last dimension of ``x`` with a ``layer`` that is float or runs in float."""
    inner = layer.layer if isinstance(layer, QuantizedLinear) else layer
    if isinstance(layer, QuantizedLinear):
        x = rounded_input(graph, layer.input_quantizer, x)
    weight = graph.add("Transpose", [_float_weight(graph, node, layer)], perm=[1, 0])
    out = graph.add("MatMul", [x, weight], node.name)
    return out if inner.bias is None else graph.add("Add", [out, *_bias(graph, node, inner.bias)])


def gdn(graph: OnnxGraph, node: fx.Node, layer: Any, x: str) -> str:
    """Normalize ``x``: by the root of beta + gamma * x^2 (GDN), or by beta + gamma * |x| (GDN1)."""
    inner = layer.layer if isinstance(layer, QuantizedGDN) else layer
    absolute = isinstance(layer, GDN1 | QuantizedGDN1)
    seen = rounded_input(graph, layer.input_quantizer, x) if isinstance(layer, QuantizedGDN) else x
    powers = graph.add("Abs", [seen]) if absolute else graph.add("Mul", [seen, seen])
    shape = graph.constant(np.array([*_gamma(layer).shape, 1, 1]))
    weight = graph.add("Reshape", [_float_weight(graph, node, layer), shape])
    beta = graph.constant(inner.beta_reparam(inner.beta).detach(), f"{node.target}.beta")
    norm = graph.add("Conv", [powers, weight, beta], node.name)
    root = norm if absolute else graph.add("Sqrt", [norm])
    return graph.add("Mul" if inner.inverse else "Div", [x, root], node.name)


def _gamma(layer: Any) -> Tensor:
    """Return the gamma that a GDN, float or quantized, multiplies with."""
    weight: Tensor = layer.weight if isinstance(layer, QuantizedGDN) else QuantizedGDN.weight_of(layer)
    return weight


def _float_weight(graph: OnnxGraph, node: fx.Node, layer: Any) -> str:
    """Return the weight that a layer that runs in float multiplies with; quantized ones are stored as integers."""
    target = str(node.target)
    if isinstance(layer, QuantizedLayer):
        integers = _integer_weight(graph, node, layer, "FLOAT")
        scale = layer.weight_quantizer.scale.detach()
        if isinstance(layer, QuantizedConvTranspose2d):  # (groups, 1, out / groups, 1, 1)
            scale = scale.expand(-1, layer.float_weight().size(1), -1, -1, -1).flatten(0, 1)
        return graph.add("Mul", [integers, graph.constant(scale, f"{target}.weight_scale")])
    if isinstance(layer, GDN | GDN1):
        return graph.constant(_gamma(layer).detach(), f"{target}.gamma")
    weight = layer.weight * layer.mask if isinstance(layer, MaskedConv2d) else layer.weight
    return graph.constant(weight.detach(), f"{target}.weight")


@torch.no_grad()
def _integer_weight(graph: OnnxGraph, node: fx.Node, layer: QuantizedLayer, cast: str) -> str:
    """Return the integers of a weight; with ``cast`` as another type. Those of lowered layers are stored compactly."""
    values = layer.weight_quantizer.integers(layer.float_weight())
    if isinstance(layer, QuantizedConvTranspose2d):
        values = values.flatten(0, 1)
    axes = node.meta.get("subpixel")
    compact = isinstance(axes, tuple) and all(axis.dilation == 1 for axis in axes)
    groups = getattr(layer.layer, "groups", 1)
    if compact:
        values = original_weight(values, groups, axes)  # type: ignore[arg-type]  # a pair, as just checked
    array = values.cpu().numpy()
    name, graph.stored[str(node.target)] = graph.integers(
        array, layer.bits, layer.signed, f"{node.target}.weight"
    )
    if cast:
        name = graph.add("Cast", [name], to=getattr(package("onnx").TensorProto, cast))
    return _lowered(graph, name, array.shape, groups, axes) if compact else name  # type: ignore[arg-type]


def _spread_weight(graph: OnnxGraph, node: fx.Node, layer: QuantizedLayer) -> tuple[str, Array]:
    """Return integers that use all 8 bits, and their steps per output channel.

    A bias is counted in steps of the products, which would be coarse with the few, large steps of narrow weights.
    """
    weight = _integer_weight(graph, node, layer, "")
    scale = layer.weight_quantizer.scale.detach().flatten().cpu().numpy()
    factor = 127 // layer.weight_quantizer.high
    if factor > 1:
        types = package("onnx").TensorProto
        wide = graph.add("Cast", [weight], to=types.INT32)
        wide = graph.add("Mul", [wide, graph.constant(np.int32(factor))])
        weight = graph.add("Cast", [wide], to=types.INT8)
    return weight, scale / max(factor, 1)


def _lowered(
    graph: OnnxGraph, weight: str, shape: tuple[int, ...], groups: int, axes: tuple[Axis, Axis]
) -> str:
    """Do what :func:`fmpq_fx.passes.subpixel.lowered_weight` does, when the graph is loaded."""
    down, right = axes
    pads = [0, 0, down.front, right.front, 0, 0, down.back, right.back]
    if any(pads):
        weight = graph.add("Pad", [weight, graph.constant(np.array(pads))])
    split = [groups, shape[0] // groups, shape[1], down.taps, down.stride, right.taps, right.stride]
    weight = graph.add("Reshape", [weight, graph.constant(np.array(split))])
    ends = [np.array(v) for v in ([-1, -1], [np.iinfo(np.int64).min] * 2, [3, 5], [-1, -1])]
    weight = graph.add("Slice", [weight, *map(graph.constant, ends)])
    weight = graph.add("Transpose", [weight], perm=[0, 2, 4, 6, 1, 3, 5])
    merged = [-1, shape[0] // groups, down.taps, right.taps]
    return graph.add("Reshape", [weight, graph.constant(np.array(merged))])


def _geometry(layer: Any) -> dict[str, Any]:
    return {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "dilations": list(layer.dilation),
        "group": layer.groups,
    }


def _padded(graph: OnnxGraph, node: fx.Node, layer: nn.Conv2d, x: str) -> tuple[str, list[int]]:
    """Return ``x``, padded where a convolution of ONNX cannot, and the padding that is left to it."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if layer.padding_mode == "zeros":
        return x, [top, left, bottom, right]
    mode = _PADDING.get(layer.padding_mode)
    if mode is None:
        raise failed(node, f"it pads with {layer.padding_mode!r}")
    pads = graph.constant(np.array([0, 0, top, left, 0, 0, bottom, right]))
    return graph.add("Pad", [x, pads], mode=mode), [0, 0, 0, 0]


def _bias(graph: OnnxGraph, node: fx.Node, bias: Tensor | None) -> list[str]:
    return [] if bias is None else [graph.constant(bias.detach(), f"{node.target}.bias")]
