"""One row for all spellings of an operation, and what only tells sizes."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fmpq_fx.passes.operations import arguments_of_module, operation_of, operation_of_module, sizes, writes


def last(function: Callable[[Tensor], Any]) -> tuple[fx.GraphModule, fx.Node]:
    """Return the graph of ``function`` and the node that it returns."""
    gm = fx.symbolic_trace(lambda x: function(x))
    node = next(iter(reversed(gm.graph.nodes))).args[0]
    assert isinstance(node, fx.Node)
    return gm, node


@pytest.mark.parametrize(
    ("name", "spellings"),
    {
        "relu": (torch.relu, F.relu, lambda x: x.relu(), lambda x: x.relu_(), torch.relu_),
        "add": (lambda x: x + 1, lambda x: 1 + x, lambda x: torch.add(x, 1), lambda x: x.add_(1)),
        "div": (lambda x: x / 2, lambda x: x.div(2), lambda x: torch.true_divide(x, 2)),
        "cat": (lambda x: torch.cat((x, x)), lambda x: torch.concat((x, x))),
        "identity": (lambda x: x.clone(), lambda x: x.detach(), lambda x: x.data, lambda x: x.contiguous()),
        "getitem": (lambda x: x[0], lambda x: operator.getitem(x, 0)),
        "max_pool2d": (lambda x: F.max_pool2d(x, 2),),
    }.items(),
)
def test_spellings_of_one_operation(name: str, spellings: tuple[Callable[[Tensor], Any], ...]) -> None:
    for spelling in spellings:
        operation = operation_of(*last(spelling))
        assert operation is not None
        assert operation.name == name


def test_modules_are_operations_with_arguments() -> None:
    operation = operation_of_module(nn.ZeroPad2d((1, 2, 3, 4)))
    assert operation is not None
    assert operation.name == "pad"
    assert arguments_of_module(nn.ZeroPad2d((1, 2, 3, 4))) == {"pad": (1, 2, 3, 4), "value": 0.0}


def test_functions_of_the_same_name_are_not_the_same() -> None:
    class Relu(nn.ReLU):
        pass

    assert operation_of_module(Relu()) is None
    assert operation_of(*last(lambda x: torch.special.expit(x))) is None


def test_what_is_computed_of_sizes_alone_is_a_size() -> None:
    gm, node = last(lambda x: x.reshape(x.size(0), x.shape[1] * 2 // 2, -1) * 2)
    found = {n.name for n in sizes(gm, gm.graph)}
    assert found == {"size", "getattr_1", "getitem", "mul", "floordiv"}
    assert node.name not in found


def test_what_writes_is_told() -> None:
    assert [writes(last(f)[1]) for f in (torch.relu, torch.relu_, lambda x: F.relu(x, inplace=True))] == [
        False,
        True,
        True,
    ]
