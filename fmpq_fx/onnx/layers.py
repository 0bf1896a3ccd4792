"""The ONNX form of layers that compute in float.

Their inputs and weights are rounded as in the quantized graph. Weights are stored as integers and multiplied by their
steps when the graph is loaded.
"""

from typing import Any

import numpy as np
import torch
from compressai.layers import GDN, GDN1
from torch import Tensor, fx, nn

from fmpq_fx.onnx.graph import OnnxGraph, failed, package
from fmpq_fx.onnx.subpixel import original_weight
from fmpq_fx.passes.annotation import note_of
from fmpq_fx.passes.transposed import Axis
from fmpq_fx.quant import ActivationFakeQuant, QuantizedLayer
from fmpq_fx.quant.layers import (
    QuantizedConvTranspose2d,
    QuantizedGDN,
    QuantizedGDN1,
    QuantizedLinear,
)
from fmpq_fx.quant.masked import mask_name, mask_of

WIDEST = 16
"""Bits of activations that ONNX can round to; more are as good as float."""

_PADDING = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def rounded_input(
    graph: OnnxGraph, quantizer: ActivationFakeQuant | None, x: str, channels: int | None = None
) -> str:
    """Return ``x`` (B, C, ...) on the grid of ``quantizer``.

    With ``channels`` (C), the step is written out for each channel, though all are the same. Where it is one number,
    ONNX Runtime takes a float convolution for one that should run in integers, if a quantizer or a ReLU and a
    quantizer follow, and rounds its weights to 8 bits with one step for the whole tensor.
    """
    if quantizer is None or quantizer.bits > WIDEST:
        return x
    if x in graph.last:  # integers are quicker to move than floats
        integers, grid = quantized(graph, quantizer, graph.last[x])
        integers = graph.add("Transpose", [integers], perm=[0, 3, 1, 2])
    else:
        integers, grid = quantized(graph, quantizer, x)
    if channels is not None:
        grid = [graph.constant(np.full(channels, value)) for value in _grid(quantizer)]
    return graph.add("DequantizeLinear", [integers, *grid])


def without_spread(graph: OnnxGraph, layer: QuantizedLayer, x: str) -> str:
    """Return ``x`` with its channels divided by their spread, as the integers of the weights want them."""
    log_spread = layer.weight_quantizer.log_spread
    if log_spread is None:
        return x
    inverse = torch.exp(-log_spread.detach())
    if x in graph.last:
        return graph.channels_first(graph.add("Mul", [graph.last[x], graph.constant(inverse, "spread")]))
    inverse = inverse.view(-1, *[1] * (-layer.channel_dim - 1))
    return graph.add("Mul", [x, graph.constant(inverse, "spread")])


def quantized(graph: OnnxGraph, quantizer: ActivationFakeQuant, x: str) -> tuple[str, list[str]]:
    """Return the integers of ``x`` on the grid of ``quantizer``, up to 16 bits, and its scale and zero point."""
    scale, zero_point = _grid(quantizer)
    if quantizer.high < np.iinfo(type(zero_point)).max:
        ends = [(end - int(zero_point)) * scale for end in (0, quantizer.high)]
        x = graph.add("Clip", [x, *(graph.constant(np.float32(end)) for end in ends)])
    grid = [graph.constant(scale, "scale"), graph.constant(zero_point, "zero_point")]
    return graph.add("QuantizeLinear", [x, *grid]), grid


def _grid(quantizer: ActivationFakeQuant) -> tuple[np.float32, np.uint8 | np.uint16]:
    """Return step and zero point of ``quantizer``; the type of the zero point is that of the integers."""
    zero_point = quantizer.zero_point.detach().round().clamp(0, quantizer.high).item()
    container = np.uint8 if quantizer.bits <= 8 else np.uint16
    return np.float32(quantizer.log_scale.detach().exp().item()), container(zero_point)


def convolution(graph: OnnxGraph, node: fx.Node, layer: Any, x: str) -> str:
    """Convolve ``x`` with a ``layer`` that is float or runs in float."""
    inner: Any = layer.layer if isinstance(layer, QuantizedLayer) else layer
    if isinstance(layer, QuantizedLayer):
        x = rounded_input(graph, layer.input_quantizer, without_spread(graph, layer, x), inner.in_channels)
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


def linear(graph: OnnxGraph, node: fx.Node, layer: Any, x: str) -> str:
    """Map the last dimension of ``x`` with a ``layer`` that is float or runs in float."""
    inner = layer.layer if isinstance(layer, QuantizedLinear) else layer
    if isinstance(layer, QuantizedLinear):
        x = rounded_input(graph, layer.input_quantizer, without_spread(graph, layer, x))
    weight = graph.add("Transpose", [_float_weight(graph, node, layer)], perm=[1, 0])
    out = graph.add("MatMul", [x, weight], node.name)
    return out if inner.bias is None else graph.add("Add", [out, *_bias(graph, node, inner.bias)])


def gdn(graph: OnnxGraph, node: fx.Node, layer: Any, x: str) -> str:
    """Normalize ``x``: by the root of beta + gamma * x^2 (GDN), or by beta + gamma * |x| (GDN1)."""
    inner = layer.layer if isinstance(layer, QuantizedGDN) else layer
    absolute = isinstance(layer, GDN1 | QuantizedGDN1)
    seen = rounded_input(graph, layer.input_quantizer, x) if isinstance(layer, QuantizedGDN) else x
    last = x in graph.last
    if last:
        seen, x = graph.channels_last(seen), graph.last[x]
    powers = graph.add("Abs", [seen]) if absolute else graph.add("Mul", [seen, seen])
    gamma = _float_weight(graph, node, layer)
    beta = graph.constant(inner.beta_reparam(inner.beta).detach(), f"{node.target}.beta")
    if last:
        product = graph.add("MatMul", [powers, graph.add("Transpose", [gamma], perm=[1, 0])])
        norm = graph.add("Add", [product, beta])
    else:
        shape = graph.constant(np.array([*_gamma(layer).shape, 1, 1]))
        norm = graph.add("Conv", [powers, graph.add("Reshape", [gamma, shape]), beta])
    root = norm if absolute else graph.add("Sqrt", [norm])
    out = graph.add("Mul" if inner.inverse else "Div", [x, root], "" if last else node.name)
    return graph.channels_first(out, node.name) if last else out


def runs_in_integers(node: fx.Node) -> bool:
    """Say whether ``node`` calls a layer that :func:`fmpq_fx.onnx.integers.run_in_integers` lets run in integers."""
    arithmetic = note_of(node).arithmetic
    return arithmetic is not None and arithmetic.kind == "int8"


def _gamma(layer: Any) -> Tensor:
    """Return the gamma that a GDN, float or quantized, multiplies with."""
    weight: Tensor = layer.weight if isinstance(layer, QuantizedGDN) else QuantizedGDN.weight_of(layer)
    return weight


def _float_weight(graph: OnnxGraph, node: fx.Node, layer: Any) -> str:
    """Return the weight that a layer that runs in float multiplies with; quantized ones are stored as integers."""
    target = str(node.target)
    if isinstance(layer, QuantizedLayer):
        integers = integer_weight(graph, node, layer, "FLOAT")
        scale = layer.weight_quantizer.output_scale.detach()
        if isinstance(layer, QuantizedConvTranspose2d):  # (groups, 1, out / groups, 1, 1)
            scale = scale.expand(-1, layer.float_weight().size(1), -1, -1, -1).flatten(0, 1)
        return graph.add("Mul", [integers, graph.constant(scale, f"{target}.weight_scale")])
    if isinstance(layer, GDN | GDN1):
        return graph.constant(_gamma(layer).detach(), f"{target}.gamma")
    weight = layer.weight * mask_of(layer) if mask_name(layer) else layer.weight
    return graph.constant(weight.detach(), f"{target}.weight")


@torch.no_grad()
def integer_weight(graph: OnnxGraph, node: fx.Node, layer: QuantizedLayer, cast: str = "") -> str:
    """Return the integers of a weight; with ``cast`` as another type. Those of lowered layers are stored compactly."""
    values = layer.weight_quantizer.integers(layer.float_weight())
    if isinstance(layer, QuantizedConvTranspose2d):
        values = values.flatten(0, 1)
    axes = note_of(node).subpixel
    if axes is not None and any(axis.dilation > 1 for axis in axes):
        axes = None
    groups = getattr(layer.layer, "groups", 1)
    if axes is not None:
        values = original_weight(values, groups, axes)
    array = values.cpu().numpy()
    name, graph.stored[str(node.target)] = graph.integers(
        array, layer.bits, layer.signed, f"{node.target}.weight"
    )
    if cast:
        name = graph.add("Cast", [name], to=getattr(package("onnx").TensorProto, cast))
    return name if axes is None else _lowered(graph, name, array.shape, groups, axes)


def _lowered(
    graph: OnnxGraph, weight: str, shape: tuple[int, ...], groups: int, axes: tuple[Axis, Axis]
) -> str:
    """Do what :func:`fmpq_fx.onnx.subpixel.lowered_weight` does, when the graph is loaded."""
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
