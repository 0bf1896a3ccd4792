"""Walk along the entropy path of one graph: from the choice of CDFs back to the latents that the decoder has.

::

    y ---------------------------------------> GaussianConditional
                                                  ^ scales, means: the walk begins here,
    z -> EntropyBottleneck -> z_hat -> h_s -> chunk    goes through chunk and h_s, and notes their layers,
                              and ends at z_hat, which is decoded

Each node on the way has an exact form, or is an obstacle. Layers with weights and LeakyReLU get exact modules. All
other operations run as they are, in the code of the user's class: they are exact if they only move and choose numbers,
or if their results have so few bits that no float type rounds them (:mod:`fmpq_fx.passes.lower.extents`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from compressai.entropy_models import EntropyBottleneck, EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import fx, nn

from fmpq_fx.exact.products import product_of
from fmpq_fx.passes.lower.extents import (
    MOST_TERMS,
    Extents,
    constant_of,
    float_layer,
    is_small_fixed_point,
)
from fmpq_fx.passes.operations import Numbers, operands_of, operation_of, operation_of_module, writes
from fmpq_fx.quant import QuantizedLayer, QuantizeLatent, quantized_class


@dataclass
class Draft:
    """The part of an entropy path found so far; see :class:`fmpq_fx.passes.lower.entropy_path.EntropyPath`."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    activations: dict[str, nn.Module] = field(default_factory=dict)
    priors: dict[str, None] = field(default_factory=dict)
    constants: dict[str, None] = field(default_factory=dict)
    obstacles: dict[str, None] = field(default_factory=dict)
    terms: int = 1

    def stop(self, node: str, reason: str) -> None:
        """Note an obstacle: ``node``, and the ``reason`` that it has no exact form."""
        self.obstacles[f"{node!r} {reason}"] = None

    def note_module(self, name: str, module: nn.Module) -> bool:
        """Note ``module``, which lies on the path; say whether the path goes on to its inputs."""
        if isinstance(module, EntropyBottleneck):
            self.priors[name] = None
        if isinstance(module, EntropyModel | QuantizeLatent | LatentCodec):
            return False
        if isinstance(module, QuantizedLayer) or quantized_class(module) is not None:
            if product_of(float_layer(module)) is not None:
                self.layers[name] = module
                return True
        elif type(module) is nn.LeakyReLU:
            self.activations[name] = module
            return True
        operation = operation_of_module(module)
        if operation is not None and operation.numbers is Numbers.KEPT:
            return True
        why = f": {operation.why}" if operation is not None and operation.why else ""
        self.stop(name, f"({type(float_layer(module)).__name__}) has no exact form{why}")
        return False


class Walk:
    """Follows one graph against its direction.

    Args:
        draft: the draft that it adds modules and obstacles to.
        root: the module whose submodules the graph calls.
        graph: the graph that it walks through.
        state: the module whose parameters and buffers the coding methods read as the graph does.
        prefix: the text before the names of modules.
        inputs: whether the decoder has the graph's inputs.
    """

    def __init__(
        self,
        draft: Draft,
        root: nn.Module,
        graph: fx.Graph,
        *,
        state: nn.Module,
        prefix: str = "",
        inputs: bool = False,
    ):
        self.draft, self.root, self.prefix, self.inputs = draft, root, prefix, inputs
        self.state = {name for name, _ in (*state.named_parameters(), *state.named_buffers())}
        self.extents = Extents(root, graph)
        self.seen: set[fx.Node] = set()

    def follow(self, ends: Iterable[fx.Node]) -> None:
        """Visit ``ends`` and all nodes that they are computed from, back to coded latents."""
        todo = list(ends)
        while todo:
            node = todo.pop()
            if node not in self.seen and node not in self.extents.sizes:
                self.seen.add(node)
                todo += self._sources(node)

    def follow_means(self, ends: Iterable[fx.Node]) -> None:
        """Follow ``ends``, which are added to decoded symbols.

        Such a sum has no largest number. If the mean is a multiple of 2^-12, float32 holds the sum exactly up to 4096,
        where all its readers saturate. With a finer mean, float32 would round it earlier.
        """
        for node in ends:
            self.follow([node])
            if self.extents[node].bits:
                self.draft.stop(
                    node.name, "is finer than 2^-12, since it was scaled down; put a convolution after that"
                )

    def _sources(self, node: fx.Node) -> Iterable[fx.Node]:
        """Note ``node``; return the nodes where the path goes on: none after latents, constants and obstacles."""
        means = self.extents.rounded.get(node)
        if isinstance(means, fx.Node):
            self.follow_means([means])
            return []
        if means is not None:
            self.draft.priors[self.prefix + means] = None
            return []
        if node.op == "call_module":
            name = str(node.target)
            module = self.root.get_submodule(name)
            if not self.draft.note_module(self.prefix + name, module):
                return []
            if not product_of(float_layer(module)):
                return self._checked(node)
            if len(node.args) > 1 or node.kwargs:
                self.draft.stop(
                    self.prefix + name, "is called with an output size, and has no exact form then"
                )
            return node.all_input_nodes
        if node.op == "get_attr":
            self._note_constant(node)
        elif node.op in ("call_function", "call_method"):
            return self._checked(node)
        elif node.op != "placeholder" or not self.inputs:
            self.draft.stop(node.name, "is not computed from coded latents")
        return []

    def _note_constant(self, node: fx.Node) -> None:
        """Note a tensor of the model that must be rounded to fixed-point numbers, or why it cannot be."""
        value, name = constant_of(self.root, node), str(node.target)
        if value is not None and is_small_fixed_point(value):
            return
        if name not in self.state:
            self.draft.stop(
                node.name, "is a constant, and not one of fixed-point numbers; make it a parameter"
            )
        elif value is None or not bool((value.abs() < 4096 // MOST_TERMS).all()):
            self.draft.stop(
                node.name, f"has values beyond {4096 // MOST_TERMS}, where sums may leave the range"
            )
        else:
            self.draft.constants[self.prefix + name] = None

    def _checked(self, node: fx.Node) -> Iterable[fx.Node]:
        """Return the inputs of ``node``, an operation without weights; nothing if it has no exact form."""
        if node.op == "call_module" and type(self.root.get_submodule(str(node.target))) is nn.LeakyReLU:
            return node.all_input_nodes
        obstacle = self._obstacle(node)
        if obstacle is not None:
            self.draft.stop(node.name, f"({node.format_node()}) {obstacle}")
            return []
        product = self.extents.product(node) if self._numbers(node) is Numbers.SCALED else None
        if product is not None:
            return [product[0]]  # the other operand is a constant, whose bits were counted
        return [] if self._numbers(node) is Numbers.MADE else node.all_input_nodes

    def _numbers(self, node: fx.Node) -> Numbers:
        operation = operation_of(self.root, node)
        return Numbers.ROUNDED if operation is None or writes(node) else operation.numbers

    def _obstacle(self, node: fx.Node) -> str | None:
        """Return why ``node`` is not exact as it is; None if it is exact."""
        operation, operands = operation_of(self.root, node), operands_of(self.root, node)
        numbers = self._numbers(node)
        if operation is None or operands is None or numbers is Numbers.ROUNDED:
            return (
                f"has no exact form: {operation.why}" if operation and operation.why else "has no exact form"
            )
        if numbers is Numbers.SCALED:
            if self.extents.product(node) is None:
                only = "only constants of few bits multiply exactly, and only powers of two divide"
                return f"has no exact form: {only}"
        elif operation.operands and (odd := [value for value in operands if not self._is_exact(value)]):
            return f"has no exact form: {odd[0]} is no fixed-point number up to {4096 // MOST_TERMS}"
        needs = self.extents.needs(node) if numbers in (Numbers.ADDED, Numbers.SCALED) else 1
        self.draft.terms = max(self.draft.terms, int(min(needs, MOST_TERMS)))
        if needs <= MOST_TERMS:
            return None
        adds = numbers is Numbers.ADDED
        if needs == math.inf:
            what = f"{'adds up' if adds else 'scales'} latents themselves"
        else:
            what = (
                f"adds up {needs} outputs of layers" if adds else f"takes {needs} times the range of a layer"
            )
        return f"{what}; put a convolution before it"

    def _is_exact(self, value: Any) -> bool:
        """Say whether an operand is a node that can be followed, or a small fixed-point number."""
        return value not in self.extents.sizes if isinstance(value, fx.Node) else is_small_fixed_point(value)
