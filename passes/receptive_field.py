"""Find how far the output of a graph sees: from which part of the input each of its places is computed.

This is interval arithmetic over the operations, with exact fractions, for each axis separately. An operation that sees
everything, or whose reach is not known, is an error that names it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import Any

from compressai.layers import GDN, GDN1
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.exact import ExactLayer
from fmpq_fx.exact.products import ConvProduct, ConvTransposeProduct, Product, product_of
from fmpq_fx.passes.operations import Places, arguments_of_module, operation_of, operation_of_module, sizes
from fmpq_fx.quant import QuantizedLayer, quantized_class


@dataclass(frozen=True)
class Reach:
    """The inputs that each place of an axis sees: place o sees ``stride * o + low`` … ``stride * o + high``.

    Where layers pad, some of these lie beyond the ends of the input.
    """

    stride: Fraction = Fraction(1)  # inputs per place
    low: Fraction = Fraction(0)  # inputs, relative to ``stride * o``; as a rule not positive
    high: Fraction = Fraction(0)
    align: int = 1  # inputs; a part that begins at a multiple of this has its places where the whole has them

    def windowed(self, stride: int, first: int, last: int) -> "Reach":
        """Return the reach of an operation whose place o reads ``stride * o + first`` … ``stride * o + last``."""
        return self._scaled(self.stride * stride, self.stride * first, self.stride * last)

    def spread(self, stride: int, first: int, last: int) -> "Reach":
        """Return the reach of an operation whose place o reads all i with o + first <= stride * i <= o + last."""
        step = self.stride / stride
        return self._scaled(step, step * first, step * last)

    def _scaled(self, stride: Fraction, first: Fraction, last: Fraction) -> "Reach":
        align = math.lcm(self.align, stride.numerator)
        return Reach(stride, self.low + first, self.high + last, align)

    def joined(self, other: "Reach") -> "Reach":
        """Return the reach of an operation that reads both; their strides must be equal."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Reach(self.stride, low, high, math.lcm(self.align, other.align))

    def inputs(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and the last input that the places ``first`` … ``last`` see, padding included."""
        return math.ceil(self.stride * first + self.low), math.floor(self.stride * last + self.high)


Reaches = tuple[Reach, Reach]
"""The reach along rows and along columns."""

_Rule = Callable[[Reaches], Reaches]


def receptive_field(gm: fx.GraphModule) -> Reaches:
    """Return which rows and columns of its input, (B, C, H, W), the output of ``gm`` sees.

    Args:
        gm: a graph with one input and one output, both images or feature maps, as
            :class:`fmpq_fx.passes.tracing.leaves.NetworkTracer` records the transforms of a codec.

    Raises:
        FmpqError: an operation sees more than a neighbourhood, or its reach is not known; the message names it.
    """
    known: dict[fx.Node, Reaches] = {}
    of_sizes = sizes(gm, gm.graph)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if known:
                raise FmpqError(f"it has a second input, {node.name!r}")
            known[node] = Reach(), Reach()
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node) or node.args[0] not in known:
                raise FmpqError("its output is not one tensor that is computed from its input")
            return known[node.args[0]]
        elif node in of_sizes:
            continue  # refused where something is computed with it
        elif reads := [known[read] for read in node.all_input_nodes if read in known]:
            _check_constants(gm, node, known, of_sizes)
            if any(read[axis].stride != reads[0][axis].stride for read in reads for axis in (0, 1)):
                raise FmpqError(f"{_named(gm, node)} reads values of several sizes")
            rows, columns = reads[0]
            for other in reads[1:]:
                rows, columns = rows.joined(other[0]), columns.joined(other[1])
            known[node] = _seen(gm, node, (rows, columns))
    raise FmpqError("it has no output")


def layer_reach(layer: nn.Module) -> Reaches:
    """Return which rows and columns of its input one layer sees.

    Raises:
        FmpqError: the layer sees more than a neighbourhood, or its reach is not known.
    """
    rule = _rule_of(layer)
    if rule is None:
        raise FmpqError(f"what a {type(layer).__name__} sees is not known")
    return rule((Reach(), Reach()))


def _seen(gm: fx.GraphModule, node: fx.Node, reads: Reaches) -> Reaches:
    """Return the reach of ``node``, whose inputs have the reach ``reads``."""
    if node.op == "call_module":
        rule = _rule_of(gm.get_submodule(str(node.target)))
        # A second argument is the output size, which decides how much a transposed convolution pads.
        if rule is not None and len(node.args) == 1 and not node.kwargs:
            return rule(reads)
    else:
        operation = operation_of(gm, node)
        places = Places.ELSEWHERE if operation is None else operation.places
        along = places is Places.ALONG and _dimension(node) == 1
        if places is Places.OWN or along or (places is Places.PICKED and _picks_channels(gm, node)):
            return reads
        if places is Places.SHUFFLED and isinstance(factor := _last(node), int):
            return _shuffled(factor)(reads)
        if places is Places.PADDED and (rule := _rule_of_pad(node)) is not None:
            return rule(reads)
    raise FmpqError(f"{_named(gm, node)} sees more than a neighbourhood, or what it sees is not known")


def _named(gm: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{str(node.target)!r} ({type(gm.get_submodule(str(node.target))).__name__})"
    return f"{node.name!r} ({getattr(node.target, '__name__', node.target)})"


def _check_constants(
    gm: fx.GraphModule, node: fx.Node, known: Mapping[fx.Node, Reaches], of_sizes: set[fx.Node]
) -> None:
    """Refuse sizes, and constants that may have another value at each place."""
    for read in node.all_input_nodes:
        if read not in known:
            if read in of_sizes:
                raise FmpqError(
                    f"{_named(gm, node)} reads {read.name!r}, a size, which is another one in a part"
                )
            value = attrgetter(str(read.target))(gm) if read.op == "get_attr" else None
            if not isinstance(value, Tensor) or any(side != 1 for side in value.shape[-2:]):
                raise FmpqError(
                    f"{_named(gm, node)} reads {read.name!r}, which may differ from place to place"
                )


def _last(node: fx.Node) -> Any:
    """Return the last argument of ``node``."""
    return (*node.args, *node.kwargs.values())[-1]


def _dimension(node: fx.Node) -> Any:
    """Return the dimension along which ``node`` joins or divides tensors."""
    if not node.args:
        return node.kwargs.get("dim", 0)
    position = 1 if isinstance(node.args[0], list | tuple) else 2  # of tensors to be joined, or of one
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)


def _picks_channels(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether ``node``, a getitem, picks one of several chunks, or some of the channels."""
    source, index = node.args
    if isinstance(index, tuple):
        return all(isinstance(i, slice) for i in index) and all(i == slice(None) for i in index[2:])
    divides = operation_of(gm, source) if isinstance(source, fx.Node) else None
    return divides is not None and divides.name in ("chunk", "split")


def _rule_of_pad(node: fx.Node) -> _Rule | None:
    """Return the rule of ``node``, a call of F.pad."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    pad: Any = given["pad"]
    mode = str(given.get("mode", "constant"))
    return _padded(pad, copied=mode == "replicate") if mode in ("constant", "replicate") else None


def _windowed(stride: Any, kernel: Any, dilation: Any, padding: Any) -> _Rule:
    """Return the rule of an operation that reads windows of ``kernel`` places.

    Each argument is (rows, columns), or one number for both; ``padding`` counts the places before the first.
    """

    def rule(reads: Reaches) -> Reaches:
        rows, columns = (
            reach.windowed(s, -p, d * (k - 1) - p)
            for reach, s, k, d, p in zip(reads, *map(_pair, (stride, kernel, dilation, padding)), strict=True)
        )
        return rows, columns

    return rule


def _spread(stride: Any, kernel: Any, dilation: Any, padding: Any) -> _Rule:
    """Return the rule of an operation that adds windows of ``kernel`` places to its output; arguments as above."""

    def rule(reads: Reaches) -> Reaches:
        rows, columns = (
            reach.spread(s, p - d * (k - 1), p)
            for reach, s, k, d, p in zip(reads, *map(_pair, (stride, kernel, dilation, padding)), strict=True)
        )
        return rows, columns

    return rule


def _pair(numbers: Any) -> tuple[int, int]:
    rows, columns = numbers if isinstance(numbers, tuple | list) else (numbers, numbers)
    return int(rows), int(columns)


def _padded(pad: Sequence[int], *, copied: bool) -> _Rule:
    """Return the rule of an operation that adds ``pad`` places: (left, right, top, bottom, …), or the first of these.

    With ``copied`` the places outside are copies of the border, so that they see as far as they lie outside.
    """
    left, right, top, bottom = (*pad, 0, 0, 0)[:4]

    def rule(reads: Reaches) -> Reaches:
        rows, columns = (
            reach.windowed(
                1, -before - (max(after, 0) if copied else 0), -before + (max(before, 0) if copied else 0)
            )
            for reach, before, after in zip(reads, (top, left), (bottom, right), strict=True)
        )
        return rows, columns

    return rule


def _shuffled(factor: int) -> _Rule:
    return _spread(factor, factor, 1, 0)


def _of_product(product: Product | None) -> _Rule | None:
    """Return the rule of a convolution; None if ``product`` is none."""
    if isinstance(product, ConvTransposeProduct):
        return _spread(product.stride, product.kernel, product.dilation, product.padding)
    if not isinstance(product, ConvProduct) or product.padding_mode not in ("constant", "replicate"):
        return None
    left, _, top, _ = product.padding
    return _windowed(product.stride, product.kernel, product.dilation, (top, left))


def _rule_of(module: nn.Module) -> _Rule | None:
    """Return the rule that turns the reach of the input of ``module`` into that of its output; None if not known."""
    if isinstance(module, ExactLayer):
        return _of_product(module.product)
    layer = module.layer if isinstance(module, QuantizedLayer) else module
    if quantized_class(layer) is not None:
        return (lambda reads: reads) if isinstance(layer, GDN | GDN1) else _of_product(product_of(layer))
    operation, arguments = operation_of_module(layer), arguments_of_module(layer)
    if operation is None:
        return None
    match operation.places:
        case Places.OWN:
            return lambda reads: reads
        case Places.SHUFFLED:
            return _shuffled(arguments["upscale_factor"])
        case Places.GATHERED:
            factor = arguments["downscale_factor"]
            return _windowed(factor, factor, 1, 0)
        case Places.WINDOW:
            window = arguments["kernel_size"], arguments.get("dilation", 1), arguments["padding"]
            return _windowed(arguments["stride"], *window)
        case Places.PADDED:
            return _padded(arguments["pad"], copied=operation.name == "replication_pad")
    return None
