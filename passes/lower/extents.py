"""Bound the size and the fineness of the numbers on the entropy path, so that no type of float rounds them.

A fixed-point number is a multiple of 2^-12 below 4096. It has 24 bits, as many as float32 holds. The sum of two such
numbers may have 25 bits: float32 rounds it and float64 does not, so that an encoder in one type and a decoder in the
other may choose different CDFs. So layers do not use the whole range: their outputs saturate at L = 4096 / n, and n
is chosen so that everything that is computed from them has 24 bits again::

    layer --+
            +-- add --+                   at most 2 L
    layer --+         +-- add             at most 3 L: n must be 3
    layer ------------+
    layer -- mul by 0.75                  a multiple of 3 * 2^-14, at most 3/4 L: as many bits as 3 L, n must be 3

A number that is at most ``size`` * L, and a multiple of 2^-(12 + ``bits``), needs n = ``size`` * 2^``bits``: it is then
an integer of at most 24 bits times a power of two.

Latents have no largest number. Until a layer reads them, which saturates at 4096 itself, they may be moved, but
neither added nor scaled down.
"""

import math
from collections.abc import Iterable
from fractions import Fraction
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from compressai.entropy_models import EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import Tensor, fx, nn

from fmpq_fx.exact.fixed_point import FRACTION_BITS, MOST
from fmpq_fx.exact.products import product_of
from fmpq_fx.passes.lower.rounded import rounded_latents
from fmpq_fx.passes.operations import Numbers, arguments_of_module, operands_of, operation_of, sizes
from fmpq_fx.quant import QuantizedLayer, QuantizeLatent

MOST_TERMS = 16
"""The largest n. Constants in sums are at most 4096 / 16 in magnitude, so that they are at most L, whatever n is."""


class Extent(NamedTuple):
    """Bounds on the numbers of a node: their size and their fineness."""

    size: Fraction | float  # their largest magnitude, in units of L; infinite for latents
    bits: int = 0  # they are multiples of 2^-(12 + bits)

    @property
    def needs(self) -> float:
        """The n with which the numbers have 24 bits."""
        return math.inf if self.size == math.inf else math.ceil(self.size * 2**self.bits)


Values = frozenset[Fraction]
"""The few numbers that a constant consists of; after an operation also their negatives and 0, which it may make."""

_MOST_VALUES = 64
_BITS = frozenset({Fraction(0), Fraction(1)})
_LATENT = Extent(math.inf)
_OUTPUT = Extent(Fraction(1))  # outputs of layers, and constants (see MOST_TERMS)


def float_layer(module: nn.Module) -> nn.Module:
    """Return the float layer inside a quantized ``module``, or ``module``."""
    return module.layer if isinstance(module, QuantizedLayer) else module


def is_small_fixed_point(value: Any) -> bool:
    """Say whether ``value``, a number or a tensor, consists of fixed-point numbers that are at most L."""
    if not isinstance(value, int | float | Tensor):
        return False
    scaled = torch.as_tensor(value).double() * 2.0**FRACTION_BITS
    return bool((scaled == scaled.round()).all() and (scaled.abs() <= MOST // MOST_TERMS).all())


def constant_of(root: nn.Module, node: fx.Node) -> Tensor | None:
    """Return the tensor that ``node`` reads from ``root``, or None if it reads none."""
    value = attrgetter(str(node.target))(root) if node.op == "get_attr" else None
    return value.detach() if isinstance(value, Tensor) else None


class Extents:
    """The extents of all nodes of a graph whose layers are exact, found in one pass from its inputs to its outputs.

    Args:
        root: the module whose submodules the nodes call.
        graph: a graph whose inputs are latents.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root = root
        self.sizes = sizes(root, graph)
        self.rounded = rounded_latents(root, graph)
        self.constants: dict[fx.Node, Values] = {}  # constants that a node can be multiplied by
        self._known: dict[fx.Node, Extent] = {}
        for node in graph.nodes:
            values = self._values(node)
            if values is not None:
                self.constants[node] = values
            self._known[node] = self._extent(node)

    def __getitem__(self, node: fx.Node) -> Extent:
        """Return the extent of the numbers of ``node``."""
        return self._known[node]

    def needs(self, node: fx.Node) -> float:
        """Return the n that the sum or product ``node`` needs; infinite if no n is enough."""
        if self._known[node].size == math.inf:
            # Float32 holds latents below 4096 exactly and rounds larger ones; float64 does not. A product with 0 or
            # with a power of two from 1 on moves no rounded latent below 4096, and beyond, the next layer saturates.
            product = self.product(node)
            harmless = product is not None and all(v.denominator == 1 and _is_power(v) for v in product[1])
            return 1 if harmless else math.inf
        return self._known[node].needs

    def product(self, node: fx.Node) -> tuple[fx.Node, Values] | None:
        """Return the node that the product or quotient ``node`` scales, and the constant factor; None without one."""
        operands = operands_of(self.root, node)
        if operands is None or len(operands) != 2:
            return None
        a, b = operands
        operation = operation_of(self.root, node)
        if operation is not None and operation.name == "div":
            divisor = [] if isinstance(b, fx.Node) else [v for v in values_of(b) or () if v and _is_power(v)]
            return (a, frozenset(1 / v for v in divisor)) if divisor else None
        for scaled, constant in ((a, b), (b, a)):
            values = self._values_of(constant)
            if values is not None and isinstance(scaled, fx.Node) and scaled not in self.sizes:
                return scaled, values
        return None

    def _values_of(self, value: Any) -> Values | None:
        return self.constants.get(value) if isinstance(value, fx.Node) else values_of(value)

    def _values(self, node: fx.Node) -> Values | None:
        """Return the values of ``node`` if it is a constant of few and short numbers, which no float type rounds."""
        if node.op == "get_attr":
            return values_of(constant_of(self.root, node))
        operation = operation_of(self.root, node)
        if operation is None or node.op == "call_module":
            return None
        values = [self._values_of(v) for v in operands_of(self.root, node) or [] if v not in self.sizes]
        if operation.numbers is Numbers.MADE:
            values = values if operation.operands else [_BITS]
        known = [v for v in values if v is not None]
        if not known or len(known) < len(values):
            return None
        if operation.numbers is Numbers.ADDED:
            return _short(v + sign * w for v in known[0] for w in known[-1] for sign in (1, -1))
        if operation.numbers in (Numbers.KEPT, Numbers.MADE):
            return _short({Fraction(0), *(sign * v for part in known for v in part for sign in (1, -1))})
        return None

    def _extent(self, node: fx.Node) -> Extent:
        if node in self.rounded:
            return _LATENT
        if node.op in ("get_attr", "placeholder"):
            return _OUTPUT if node.op == "get_attr" else _LATENT
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if isinstance(module, EntropyModel | QuantizeLatent | LatentCodec):
                return _LATENT
            if product_of(float_layer(module)) is not None:
                return _OUTPUT
            if type(module) is nn.LeakyReLU:  # its exact form rounds to multiples of 2^-12
                grows = max(Fraction(1), abs(Fraction(arguments_of_module(module)["negative_slope"])))
                return Extent(self._joined(node.all_input_nodes).size * grows)
        operation, values = operation_of(self.root, node), operands_of(self.root, node)
        if operation is None or values is None:
            return _OUTPUT  # any extent will do: the operation has no exact form, and the walk says so
        if operation.numbers is Numbers.MADE:
            return _OUTPUT
        if operation.numbers is Numbers.KEPT:
            return self._joined(values)
        if operation.numbers is Numbers.ADDED:
            parts = [self._of(value) for value in values]
            return Extent(sum(part.size for part in parts), max(part.bits for part in parts))
        if operation.numbers is Numbers.SCALED and (product := self.product(node)) is not None:
            of, largest, bits = self._of(product[0]), max(map(abs, product[1])), max(map(_bits, product[1]))
            return Extent(of.size if of.size == math.inf else of.size * largest, of.bits + bits)
        return _OUTPUT

    def _of(self, value: Any) -> Extent:
        return self._known[value] if isinstance(value, fx.Node) else _OUTPUT

    def _joined(self, values: Iterable[Any]) -> Extent:
        """Return the extent of numbers that are taken from any of ``values``."""
        parts = [self._of(value) for value in values if value not in self.sizes]
        return Extent(
            max((p.size for p in parts), default=Fraction(1)), max((p.bits for p in parts), default=0)
        )


def values_of(constant: Any) -> Values | None:
    """Return the numbers in ``constant``, a number or a tensor; None if they are many or long, or it is neither."""
    if not isinstance(constant, int | float | Tensor):
        return None
    numbers = torch.as_tensor(constant).double().unique().tolist()
    finite = len(numbers) <= _MOST_VALUES and all(map(math.isfinite, numbers))
    return _short(map(Fraction, numbers)) if finite else None


def _short(numbers: Iterable[Fraction]) -> Values | None:
    """Return ``numbers`` if they are few and each is a multiple of 2^-12 below 4096; else None."""
    values = frozenset(numbers)
    short = all(abs(v) < 2**FRACTION_BITS and _bits(v) <= FRACTION_BITS for v in values)
    return values if short and 0 < len(values) <= _MOST_VALUES else None


def _is_power(number: Fraction) -> bool:
    """Say whether ``number``, whose denominator is a power of two, is itself a power of two, or 0."""
    magnitude = abs(number.numerator)
    return magnitude & (magnitude - 1) == 0


def _bits(number: Fraction) -> int:
    """Return the least b, 0 for 0, for which ``number``, an integer over a power of two, is a multiple of 2^-b."""
    trailing_zeros = max(0, (number.numerator & -number.numerator).bit_length() - 1)
    return number.denominator.bit_length() - 1 - trailing_zeros
