"""The ONNX form of everything that is no layer with weights: one table of operations, and what emits each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from compressai.layers import GDN, GDN1, MaskedConv2d
from torch import fx, nn

from fmpq_fx.onnx import layers
from fmpq_fx.onnx.graph import OnnxGraph, failed, shape_of
from fmpq_fx.onnx.integer_layers import integer_convolution
from fmpq_fx.passes.operations import arguments_of_module, operation_of
from fmpq_fx.quant.layers import (
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedGDN,
    QuantizedGDN1,
    QuantizedLinear,
    QuantizedMaskedConv2d,
)

Emit = Callable[..., Any]
"""From the graph, the node, and the arguments of the operation to the name of the result, or several names."""


def emit(graph: OnnxGraph, gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Add the ONNX form of ``node`` to ``graph`` and return the name of its value (or a list of names).

    Args:
        graph: what is being put together.
        gm: the graph of ``node``, for its modules.
        node: whose shape is known (:func:`fmpq_fx.onnx.graph.shape_of`).
        values: names of the values of the nodes before.

    Raises:
        FmpqError: there is no ONNX form.
    """
    if missing := [read.name for read in node.all_input_nodes if read not in values]:
        raise failed(node, f"it reads {missing[0]!r}, which has none")
    module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    kind = next((kind for kind in type(module).__mro__ if kind in LAYERS), None)
    if kind is not None and type(module).forward is kind.forward:  # no subclass that computes something else
        return LAYERS[kind](graph, node, module, *args)
    operation = operation_of(gm, node)
    if operation is None or operation.name not in OPERATIONS:
        what = f"{node.op} {getattr(node.target, '__name__', node.target)!r}"
        raise failed(node, f"there is none of {what if module is None else f'a {type(module).__name__}'}")
    if module is not None:
        kwargs = {**kwargs, **arguments_of_module(module)}
    try:
        return OPERATIONS[operation.name](graph, node, *args, **kwargs)
    except TypeError as error:  # an argument that the emitter does not know
        raise failed(node, f"{node.format_node()} has arguments that are not known here ({error})") from error


def _unary(op: str, **attributes: Any) -> Emit:
    def emitter(graph: OnnxGraph, node: fx.Node, x: str, inplace: bool = False) -> str:
        return _pointwise(graph, node, op, [x], **attributes)

    return emitter


def _binary(op: str, swapped: bool = False) -> Emit:
    def emitter(graph: OnnxGraph, node: fx.Node, a: Any, b: Any) -> str:
        inputs = [_operand(graph, node, operand) for operand in (a, b)]
        return _pointwise(graph, node, op, inputs[::-1] if swapped else inputs)

    return emitter


def _pointwise(graph: OnnxGraph, node: fx.Node, op: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Compute each element from those at its place, with the channels last if they are so already."""
    shapes = {shape_of(read) for read in node.all_input_nodes}
    shape = shapes.pop()
    if shapes or len(shape) != 4 or not any(x in graph.last for x in inputs):
        return graph.add(op, inputs, node.name, **attributes)
    moved = [x if graph.is_scalar(x) else graph.channels_last(x) for x in inputs]
    return graph.channels_first(graph.add(op, moved, **attributes), node.name)


def _operand(graph: OnnxGraph, node: fx.Node, operand: Any) -> str:
    if isinstance(operand, str):
        return operand
    if isinstance(operand, int | float):
        return graph.constant(np.float32(operand))
    raise failed(node, f"{operand!r} is no operand")


def _relu(graph: OnnxGraph, node: fx.Node, x: str, inplace: bool = False) -> str:
    return _pointwise(graph, node, "Relu", [x])


def _leaky_relu(
    graph: OnnxGraph, node: fx.Node, x: str, negative_slope: float = 0.01, inplace: bool = False
) -> str:
    return _pointwise(graph, node, "LeakyRelu", [x], alpha=float(negative_slope))


def _clamp(graph: OnnxGraph, node: fx.Node, x: str, min: Any = None, max: Any = None) -> str:
    ends = ["" if end is None else _operand(graph, node, end) for end in (min, max)]
    return graph.add("Clip", [x, *ends], node.name)


def _cat(graph: OnnxGraph, node: fx.Node, tensors: Sequence[str], dim: int = 0) -> str:
    return graph.add("Concat", list(tensors), node.name, axis=dim)


def _chunk(graph: OnnxGraph, node: fx.Node, x: str, chunks: int, dim: int = 0) -> list[str]:
    size = _sizes(node)[dim]
    return _split(graph, node, x, -(-size // chunks), dim)


def _split(graph: OnnxGraph, node: fx.Node, x: str, split_size: Any, dim: int = 0) -> list[str]:
    sizes = _sizes(node)
    if dim % len(sizes) != 1:
        raise failed(node, "it splits a dimension whose size is not that of the channels, and not known")
    size = sizes[dim]
    if isinstance(split_size, int):
        split_size = [min(split_size, size - start) for start in range(0, size, split_size)]
    parts = graph.constant(np.array(split_size))
    return graph.add_several("Split", [x, parts], len(split_size), node.name, axis=dim)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return shape_of(node.all_input_nodes[0])


def _item(graph: OnnxGraph, node: fx.Node, x: Any, index: Any) -> str:
    if isinstance(x, list):
        return str(x[index])
    rank = len(_sizes(node))
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (rank - len(index) + 1), *index[at + 1 :])
    starts, ends, axes, steps = [], [], [], []
    for axis, part in enumerate(index):
        if not isinstance(part, slice):
            raise failed(node, f"it indexes with {part!r}; slices have a form")
        if part != slice(None):
            starts.append(part.start or 0)
            ends.append(np.iinfo(np.int64).max if part.stop is None else part.stop)
            axes.append(axis)
            steps.append(1 if part.step is None else part.step)
    tables = [graph.constant(np.array(table)) for table in (starts, ends, axes, steps)]
    return graph.add("Slice", [x, *tables], node.name)


def _convolution(graph: OnnxGraph, node: fx.Node, layer: QuantizedConv2d, x: str) -> str:
    form = integer_convolution if layers.runs_in_integers(node) else layers.convolution
    return form(graph, node, layer, x)


def _pixel_shuffle(graph: OnnxGraph, node: fx.Node, x: str, upscale_factor: int) -> str:
    if x not in graph.by_place:
        return graph.add("DepthToSpace", [x], node.name, blocksize=upscale_factor, mode="CRD")
    last = graph.last[x]  # (B, H, W, factor * factor * C)
    apart = graph.add("Reshape", [last, graph.constant(np.array([0, 0, 0, upscale_factor, -1]))])
    rows = graph.add("Transpose", [apart], perm=[0, 1, 3, 2, 4])
    shape = graph.add(
        "Mul", [graph.add("Shape", [last]), graph.constant(np.array([1, *[upscale_factor] * 2, 1]))]
    )
    shape = graph.add("Div", [shape, graph.constant(np.array([1, 1, 1, upscale_factor**2]))])
    return graph.channels_first(graph.add("Reshape", [rows, shape]), node.name)


def _pad(
    graph: OnnxGraph,
    node: fx.Node,
    x: str,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> str:
    if mode != "constant":
        raise failed(node, f"it pads with {mode!r}")
    rank = len(_sizes(node))
    befores, afters = [0] * rank, [0] * rank
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        befores[rank - 1 - i], afters[rank - 1 - i] = before, after
    pads = graph.constant(np.array([*befores, *afters]))
    return graph.add("Pad", [x, pads, graph.constant(np.float32(value or 0))], node.name)


def _mean(graph: OnnxGraph, node: fx.Node, x: str, dim: Any, keepdim: bool = False) -> str:
    axes = graph.constant(np.atleast_1d(np.array(dim)))
    return graph.add("ReduceMean", [x, axes], node.name, keepdims=int(keepdim))


def _unflatten(graph: OnnxGraph, node: fx.Node, x: str, dim: int, sizes: Sequence[int]) -> str:
    rank = len(_sizes(node))
    if dim % rank != rank - 1:
        raise failed(node, "it unflattens another dimension than the last")
    return graph.add("Reshape", [x, graph.constant(np.array([0] * (rank - 1) + list(sizes)))], node.name)


def _flatten(graph: OnnxGraph, node: fx.Node, x: str, start_dim: int = 0, end_dim: int = -1) -> str:
    rank = len(_sizes(node))
    if end_dim % rank != rank - 1:
        raise failed(node, "it flattens up to another dimension than the last")
    return graph.add("Reshape", [x, graph.constant(np.array([0] * (start_dim % rank) + [-1]))], node.name)


def _permute(graph: OnnxGraph, node: fx.Node, x: str, *dims: Any) -> str:
    order = dims[0] if isinstance(dims[0], tuple | list) else dims
    return graph.add("Transpose", [x], node.name, perm=[dim % len(order) for dim in order])


def _gelu(graph: OnnxGraph, node: fx.Node, x: str, approximate: str = "none") -> str:
    return graph.add("Gelu", [x], node.name, approximate=approximate)


def _silu(graph: OnnxGraph, node: fx.Node, x: str, inplace: bool = False) -> str:
    return graph.add("Mul", [x, graph.add("Sigmoid", [x])], node.name)


def _same(graph: OnnxGraph, node: fx.Node, x: str) -> str:
    return x


_UNARY = {
    "abs": "Abs",
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "round": "Round",
    "softplus": "Softplus",
}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"}
OPERATIONS: dict[str, Emit] = {
    **{name: _unary(op) for name, op in _UNARY.items()},
    **{name: _binary(op) for name, op in _BINARY.items()},
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "silu": _silu,
    "clamp": _clamp,
    "cat": _cat,
    "chunk": _chunk,
    "split": _split,
    "getitem": _item,
    "pixel_shuffle": _pixel_shuffle,
    "pad": _pad,
    "mean": _mean,
    "unflatten": _unflatten,
    "flatten": _flatten,
    "permute": _permute,
    "identity": _same,
}
"""By the names of the rows in :mod:`fmpq_fx.passes.operations`."""

_FLOAT = (nn.Conv2d, nn.ConvTranspose2d, MaskedConv2d, QuantizedMaskedConv2d, QuantizedConvTranspose2d)
LAYERS: dict[type[Any], Emit] = {
    **dict.fromkeys(_FLOAT, layers.convolution),
    QuantizedConv2d: _convolution,
    **dict.fromkeys((nn.Linear, QuantizedLinear), layers.linear),
    **dict.fromkeys((GDN, GDN1, QuantizedGDN, QuantizedGDN1), layers.gdn),
}
