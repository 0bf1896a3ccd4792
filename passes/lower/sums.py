"""Sums on the entropy path: of how many outputs of layers, so that these can saturate before a sum leaves the range.

Beyond the range float32 rounds fixed-point numbers and float64 does not, and a further sum may come back into it.
"""

import math
import operator
from typing import Any

import torch
from compressai.entropy_models import EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import fx, nn

from fmpq_fx.exact.fixed_point import FRACTION_BITS, MOST
from fmpq_fx.exact.products import product_of
from fmpq_fx.quant import QuantizedLayer, QuantizeLatent

SUMS = (torch.add, torch.sub, operator.add, operator.sub, "add", "sub")
NO_NUMBERS = (
    "size",
    "dim",
    "shape",
    "dtype",
    "device",
)  # what asks a tensor for something else than its values
MOST_TERMS = 16
"""Of a sum of sums, altogether. A constant has the room of one of as many."""


def adds_fixed_point(node: fx.Node) -> bool:
    """Say whether the sum ``node`` adds fixed-point numbers if its inputs are such."""
    numbers = [value for value in node.args if not isinstance(value, fx.Node)]
    return not node.kwargs and all(map(_is_small_fixed_point, numbers))


def _is_small_fixed_point(value: Any) -> bool:
    if not isinstance(value, int | float):
        return False
    scaled = float(value * 2**FRACTION_BITS)
    return scaled.is_integer() and abs(scaled) <= MOST // MOST_TERMS


def float_layer(module: nn.Module) -> nn.Module:
    """Return the float layer inside a quantized ``module``, or ``module``."""
    return module.layer if isinstance(module, QuantizedLayer) else module


class TermCounter:
    """Counts of how many terms the values of nodes are the sum.

    Args:
        root: has the modules that the nodes call.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self._known: dict[fx.Node, float] = {}

    def __call__(self, node: fx.Node) -> float:
        """Return of how many outputs of layers ``node`` may be the sum: of infinitely many if of latents, unbounded."""
        if node not in self._known:
            self._known[node] = self._count(node)
        return self._known[node]

    def _count(self, node: fx.Node) -> float:
        if node.op == "placeholder":
            return math.inf
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if isinstance(module, EntropyModel | QuantizeLatent | LatentCodec):
                return math.inf
            if product_of(float_layer(module)) is not None:
                return 1
        if (node.args[1] if node.target is getattr else node.target) in NO_NUMBERS:
            return 0
        if node.target in SUMS:
            return sum(self(value) if isinstance(value, fx.Node) else 1 for value in node.args)
        return max(map(self, node.all_input_nodes), default=1)
