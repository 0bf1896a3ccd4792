"""Integer convolutions in ONNX: gather patches, multiply matrices of 8-bit integers, scale the exact sums.

ONNX Runtime's integer convolution is fast only where its output is rounded to 8 bits as well, which costs quality. Its
integer matrix product is no slower and leaves float32, so that nothing is rounded that the quantized graph does not
round: DequantizeLinear on both sides of a MatMul, which become one kernel. Values have their channels last here,
(B, H, W, C); those of one place of the kernel are then one block to copy.
"""

import functools

import numpy as np
import torch.nn.functional as F
from torch import fx, nn

from fmpq_fx.onnx.graph import Array, OnnxGraph, package
from fmpq_fx.onnx.integers import BITS
from fmpq_fx.onnx.layers import integer_weight, quantized, without_spread
from fmpq_fx.quant.layers import QuantizedConv2d


def integer_convolution(graph: OnnxGraph, node: fx.Node, layer: QuantizedConv2d, x: str) -> str:
    """Convolve ``x`` (B, C, H, W), rounded to 8 bits, with integer weights; the output is float32."""
    assert layer.input_quantizer is not None
    places = _places(node)
    integers, grid = quantized(
        graph, layer.input_quantizer, graph.channels_last(without_spread(graph, layer, x))
    )
    patches = graph.add("DequantizeLinear", [_patches(graph, integers, grid[1], layer.layer), *grid])
    weight = _matrix(graph, integer_weight(graph, node, layer), tuple(layer.weight.shape), places)
    steps = _by_place(layer.weight_quantizer.output_scale.detach().flatten().cpu().numpy(), places)
    terms = []
    for byte, factor in _bytes(graph, weight, layer.bits):
        scale = graph.constant(steps * np.float32(factor), f"{node.target}.weight_scale")
        terms.append(graph.add("MatMul", [patches, graph.add("DequantizeLinear", [byte, scale], axis=1)]))
    if layer.bias is not None:
        bias = _by_place(layer.bias.detach().cpu().numpy(), places)
        terms.append(graph.constant(bias, f"{node.target}.bias"))
    out = functools.reduce(lambda a, b: graph.add("Add", [a, b]), terms)
    first = graph.channels_first(out, node.name)
    if places > 1:
        graph.by_place.add(first)
    return first


def _places(node: fx.Node) -> int:
    """Return how many places a pixel shuffle makes of the channels of ``node``, if nothing else reads it; or 1."""
    (reader,) = node.users if len(node.users) == 1 else (node,)
    if reader.op == "call_function" and reader.target is F.pixel_shuffle:
        factor = reader.args[1]
        return int(factor) ** 2  # type: ignore[arg-type]  # a whole number, which fx's types do not say
    root = node.graph.owning_module
    module = root.get_submodule(str(reader.target)) if root and reader.op == "call_module" else None
    return module.upscale_factor**2 if isinstance(module, nn.PixelShuffle) else 1


def _by_place(values: Array, places: int) -> Array:
    """Return ``values``, whose places of a channel are neighbours, with the channels of a place as neighbours."""
    return values.reshape(-1, places).T.flatten()


def _matrix(graph: OnnxGraph, weight: str, shape: tuple[int, ...], places: int) -> str:
    """Return ``weight`` (N, C, kH, kW) as a matrix (kH * kW * C, N) with the outputs of a place as neighbours.

    ONNX Runtime does that once, when it loads the graph.
    """
    apart = graph.constant(np.array([shape[0] // places, places, *shape[1:]]))
    moved = graph.add("Transpose", [graph.add("Reshape", [weight, apart])], perm=[3, 4, 2, 1, 0])
    return graph.add("Reshape", [moved, graph.constant(np.array([-1, shape[0]]))])


def _bytes(graph: OnnxGraph, weight: str, bits: int) -> list[tuple[str, int]]:
    """Return int8 tensors and factors, by which they add up to ``weight``, which is float32 above 8 bits."""
    if bits <= BITS:
        return [(weight, 1)]
    types, base = package("onnx").TensorProto, 2 ** (bits - BITS + 1)
    shifted = graph.add(
        "Add", [graph.add("Div", [weight, graph.constant(np.float32(base))]), graph.constant(np.float32(0.5))]
    )
    high = graph.add("Floor", [shifted])
    low = graph.add("Sub", [weight, graph.add("Mul", [high, graph.constant(np.float32(base))])])
    return [(graph.add("Cast", [byte], to=types.INT8), factor) for byte, factor in ((high, base), (low, 1))]


def _patches(graph: OnnxGraph, x: str, zero_point: str, layer: nn.Conv2d) -> str:
    """Return what each output of ``layer`` sees of ``x`` (B, H, W, C), (B, H', W', kH * kW * C)."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    if any((left, right, top, bottom)):
        pads = graph.constant(np.array([0, top, left, 0, 0, bottom, right, 0]))
        x = graph.add("Pad", [x, pads, zero_point])
    if layer.kernel_size == layer.stride == (1, 1):
        return x
    index = _places_seen(graph, x, layer)
    channels = layer.in_channels
    rows = graph.add("Reshape", [x, graph.constant(np.array([0, -1, channels]))])
    seen = graph.add("Gather", [rows, index], axis=1)  # (B, H', W', kH * kW, C)
    return graph.add("Reshape", [seen, graph.constant(np.array([0, 0, 0, -1]))])


def _places_seen(graph: OnnxGraph, x: str, layer: nn.Conv2d) -> str:
    """Return the places of ``x`` (B, H, W, C) that outputs of ``layer`` see, (H', W', kH * kW), counted row by row."""
    (_, rows), (width, columns) = (_side(graph, x, layer, axis) for axis in (0, 1))
    down, right = (
        np.arange(kernel, dtype=np.int32) * dilation
        for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    )
    taps = graph.add("Mul", [graph.constant(down.repeat(right.size)), width])
    taps = graph.add("Add", [taps, graph.constant(np.tile(right, down.size))])
    starts = graph.add("Reshape", [graph.add("Mul", [rows, width]), graph.constant(np.array([-1, 1, 1]))])
    columns = graph.add("Reshape", [columns, graph.constant(np.array([-1, 1]))])
    return graph.add("Add", [starts, graph.add("Add", [columns, taps])])


def _side(graph: OnnxGraph, x: str, layer: nn.Conv2d, axis: int) -> tuple[str, str]:
    """Return the size of ``x`` (B, H, W, C) along a spatial ``axis``, and where the kernel starts along it; int32."""
    shape = graph.add("Shape", [x], start=axis + 1, end=axis + 2)
    side = graph.add("Cast", [shape], to=package("onnx").TensorProto.INT32)
    extent = np.array([layer.dilation[axis] * (layer.kernel_size[axis] - 1)], np.int32)
    end = graph.add("Squeeze", [graph.add("Sub", [side, graph.constant(extent)])])
    limits = [graph.constant(np.int32(0)), end, graph.constant(np.int32(layer.stride[axis]))]
    return side, graph.add("Range", limits)
