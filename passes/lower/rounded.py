"""Find latents that a forward rounds itself, as ``round(y - means) + means``, and an entropy model codes.

Channel-conditional codecs write this out, because they want another gradient than the entropy model's. The decoder has
these latents: they are symbols plus means, and this sum is as exact as the entropy model's own.
"""

from typing import Any

from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from torch import fx, nn

from fmpq_fx.passes.operations import operands_of, operation_of


def arguments_of(node: fx.Node, module: nn.Module) -> dict[str, Any]:
    """Return the arguments of ``node``, a call of the entropy model ``module``, by name."""
    names = ("inputs", "scales", "means") if isinstance(module, GaussianConditional) else ("inputs",)
    return {names[i] if i < len(names) else str(i): value for i, value in enumerate(node.args)} | node.kwargs


def rounded_latents(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, fx.Node | str]:
    """Return the nodes of ``graph`` that are such latents -> their means, or the entropy bottleneck of their medians.

    Args:
        root: the module whose submodules the graph calls.
        graph: the graph of a model.
    """
    match = _Match(root)
    # Coded node -> its means, and the name of the bottleneck.
    coded: dict[fx.Node, tuple[Any, str | None]] = {}
    for node in graph.nodes:
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, EntropyModel):
            given = arguments_of(node, module)
            name = str(node.target) if isinstance(module, EntropyBottleneck) else None
            coded[match.bare(given.get("inputs"))] = match.bare(given.get("means")), name
    found: dict[fx.Node, fx.Node | str] = {}
    for node in graph.nodes:
        for rounded, means in match.orders(node, "add"):
            difference = match.rounded(rounded)
            for y, subtracted in match.pairs(difference, "sub"):
                if match.bare(subtracted) is not match.bare(means):
                    continue
                expected, bottleneck = coded.get(match.bare(y), (None, None))
                if bottleneck is not None and match.is_median(means, bottleneck):
                    found[node] = bottleneck
                elif coded.get(difference) == (None, None) or expected is match.bare(means):
                    found[node] = means
    return found


class _Match:
    """Recognizes the pieces of ``round(y - means) + means``; its arguments may be any nodes or values."""

    def __init__(self, root: nn.Module):
        self.root = root

    def bare(self, node: Any) -> Any:
        """Return the node whose values ``node`` passes on, behind all calls of detach() and the like."""
        while self._is(node, "identity"):
            node = node.all_input_nodes[0]
        return node

    def pairs(self, node: Any, name: str) -> list[tuple[fx.Node, fx.Node]]:
        """Return the two operands of ``node`` if it is the operation ``name`` on two nodes; else nothing."""
        values = operands_of(self.root, node) if self._is(node, name) else None
        if not values or len(values) != 2 or not all(isinstance(value, fx.Node) for value in values):
            return []
        return [(values[0], values[1])]

    def orders(self, node: Any, name: str) -> list[tuple[fx.Node, fx.Node]]:
        """Return the two operands in both orders."""
        return [pair for a, b in self.pairs(node, name) for pair in ((a, b), (b, a))]

    def rounded(self, node: Any) -> Any:
        """Return the node d if ``node`` is round(d), or None.

        ``(round(d) - d) + d`` counts as well. It is exact: each type of float holds the difference.
        """
        node = self.bare(node)
        if self._is(node, "round") and len(node.args) == 1 and not node.kwargs:
            return self.bare(node.args[0])
        for moved, back in self.orders(node, "add"):
            for up, down in self.pairs(self.bare(moved), "sub"):
                if self.bare(down) is self.bare(back) is self.rounded(up):
                    return self.bare(back)
        return None

    def is_median(self, node: fx.Node, bottleneck: str) -> bool:
        """Say whether ``node`` reads the medians of ``bottleneck``."""
        item = self.bare(node)
        if not self._is(item, "getitem") or item.args[1] != (slice(None), slice(None), slice(1, 2)):
            return False
        read = self.bare(item.args[0])
        return bool(read.op == "get_attr" and read.target == f"{bottleneck}.quantiles")

    def _is(self, node: Any, name: str) -> bool:
        operation = operation_of(self.root, node) if isinstance(node, fx.Node) else None
        return operation is not None and operation.name == name
