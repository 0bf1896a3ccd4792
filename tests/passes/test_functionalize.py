"""In-place operations: rewritten with the same results, and no value of a node changes once computed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.functionalize import functionalize
from fmpq_fx.passes.trace import check_trace, trace
from support.traced_models import Codec, Make, assert_same, each_model, lively, outputs, photos


class Keeping(fx.Interpreter):
    """Keeps a copy of every value beside the value itself."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.copies = {**getattr(self, "copies", {}), n: (value, copy.deepcopy(value))}
        return value


def assert_no_value_changes(gm: fx.GraphModule, x: Tensor) -> None:
    interpreter = Keeping(gm)
    with torch.no_grad():
        interpreter.run(x)
    for node, (value, before) in interpreter.copies.items():
        assert not isinstance(value, Tensor) or torch.equal(value, before), node


@each_model
def test_no_value_of_a_functionalized_graph_changes_once_computed(make: Make) -> None:
    assert_no_value_changes(functionalize(trace(lively(make))), photos(1))


INPLACE: dict[str, Callable[[Any, Any], Any]] = {
    "relu(inplace=True)": lambda m, y: F.relu(y, inplace=True),
    "leaky_relu(y, 0.3, True)": lambda m, y: F.leaky_relu(y, 0.3, True),
    "nn.ReLU": lambda m, y: m.relu(y),
    "clamp_": lambda m, y: y.clamp_(min=0),
    "torch.relu_": lambda m, y: torch.relu_(y),
    "F.elu_": lambda m, y: F.elu_(y),
    "chain": lambda m, y: m.relu(y.mul_(2)).add_(1),
}


@pytest.mark.parametrize("change", INPLACE.values(), ids=INPLACE)
def test_what_reads_an_overwritten_value_reads_the_result(change: Callable[[Any, Any], Any]) -> None:
    def analysis(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.conv(x)
        before = y * 3
        z: Tensor = before + change(m, y) + 5 * y
        return z

    model, x = Codec(analysis).eval(), photos()
    gm = functionalize(trace(model))
    assert_same(outputs(gm, x), outputs(model, x))
    assert_no_value_changes(gm, x)


DIFFICULT: dict[str, Callable[[Any, Any], Any]] = {
    "discarded": lambda m, x: [y := m.conv(x), y.relu_(), y][-1],
    "input": lambda m, x: m.conv(x.sub_(0.5)),
}


@pytest.mark.parametrize("analysis", DIFFICULT.values(), ids=DIFFICULT)
def test_in_place_operations_that_leave_no_result(analysis: Callable[[Any, Any], Any]) -> None:
    model, x = Codec(analysis).eval(), photos()
    check_trace(model, functionalize(trace(model)), x)
    assert torch.equal(x, photos()), "the caller's images were overwritten"


def test_what_has_no_out_of_place_form_is_named() -> None:
    with pytest.raises(FmpqError, match=r"zero_.*no out-of-place form"):
        functionalize(trace(Codec(lambda m, x: m.conv(x).zero_()).eval()))
