"""Writes: recorded with the same results, also through views, and no value of a node changes once computed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.check_trace import check_trace
from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.functions import set_item
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
def test_no_value_of_a_graph_changes_once_computed(make: Make) -> None:
    assert_no_value_changes(trace(lively(make)), photos(1))


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
    gm = trace(model)
    assert_same(outputs(gm, x), outputs(model, x))
    assert_no_value_changes(gm, x)


DIFFICULT: dict[str, Callable[[Any, Any], Any]] = {
    "discarded": lambda m, x: [y := m.conv(x), y.relu_(), y][-1],
    "input": lambda m, x: m.conv(x.sub_(0.5)),
}


@pytest.mark.parametrize("analysis", DIFFICULT.values(), ids=DIFFICULT)
def test_in_place_operations_that_leave_no_result(analysis: Callable[[Any, Any], Any]) -> None:
    model, x = Codec(analysis).eval(), photos()
    check_trace(model, trace(model), x)
    assert torch.equal(x, photos()), "the caller's images were overwritten"


def chunks_scaled(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.conv(x)
    first, second, third = y.chunk(3, 1)
    second.mul_(2).add_(first)
    return torch.cat((y, third), 1)[:, :3] * second


WRITTEN: dict[str, Callable[[Any, Any], Any]] = {
    "zeros": lambda m, x: [y := m.conv(x), z := y * 1, z.zero_(), y + z][-1],
    "fill and copy": lambda m, x: [y := m.conv(x), z := torch.empty_like(y).fill_(0.5), z.copy_(y + z), z][
        -1
    ],
    "items": lambda m, x: [
        y := m.conv(x),
        z := y.clone(),
        z.__setitem__((..., slice(0, None, 2)), y[..., 1::2]),
        z,
    ][-1],
    "a number at a mask": lambda m, x: [y := m.conv(x), y.__setitem__(y < 0, 0.1), y][-1],
    "a view of a view": lambda m, x: [y := m.conv(x), y[:, 0:2][:, 1].mul_(3), y][-1],
    "a view taken before": lambda m, x: [y := m.conv(x), v := y[:, :1], y.mul_(2), y + v][-1],
    "a view that is written to": lambda m, x: [y := m.conv(x), v := y[:, :1].relu_(), y + v][-1],
    "transposed": lambda m, x: [y := m.conv(x), y.transpose(1, 2)[:, 3].add_(1), y][-1],
    "reshaped": lambda m, x: [y := m.conv(x), y.view(len(y), -1)[:, ::5].neg_(), y][-1],
    "an attribute": lambda m, x: [y := m.conv(x), y.mT[..., 3].neg_(), y][-1],
    "out=": lambda m, x: [y := m.conv(x), z := torch.empty_like(y), torch.add(y, 1, out=z), z][-1],
    "of another type": lambda m, x: [
        y := m.conv(x),
        n := torch.ones_like(y, dtype=torch.int),
        n.mul_(2),
        y * n,
    ][-1],
    "chunks": chunks_scaled,
}


def items_added(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.conv(x)
    y[..., ::2, 1::2] += 1
    y[:, 1] *= y[:, 0]
    y[:, -1, :2] -= 1
    return y


@pytest.mark.parametrize("analysis", [*WRITTEN.values(), items_added], ids=[*WRITTEN, "items added to"])
def test_writes_reach_all_that_shares_memory(analysis: Callable[[Any, Any], Any]) -> None:
    model, x = Codec(analysis).eval(), photos()
    gm = trace(model, photos())
    check_trace(model, gm, x)
    assert_no_value_changes(gm, x)


def test_an_item_that_is_added_to_is_one_assignment() -> None:
    gm = trace(Codec(lambda m, x: items_added(m, x)), photos())
    assert [node.name for node in gm.graph.nodes if node.target is set_item] == [
        "set_item",
        "set_item_1",
        "set_item_2",
    ]


def unseen(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.conv(x)
    y.detach().mul_(2)
    return y


def without_gradients(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.conv(x)
    with torch.no_grad():
        y.mul_(2)
    return y


def to_the_model(m: Any, x: Tensor) -> Tensor:
    m.shift.data += 1
    return m.conv(x) + m.shift  # type: ignore[no-any-return]


def to_the_weight(m: Any, x: Tensor) -> Tensor:
    m.shift.data = m.shift.data * 2
    return m.conv(x) + m.shift  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("analysis", "words"),
    [
        (
            unseen,
            r"shares memory with one that was written to at \S*test_writes\.py:\d+: y\.detach\(\)\.mul_",
        ),
        (without_gradients, r"writes within torch\.no_grad\(\)(.|\n)*test_writes\.py:\d+: y\.mul_\(2\)"),
        (to_the_model, r"writes to 'shift', which belongs to the model(.|\n)*a buffer of the layer"),
        (to_the_weight, r"writes to 'shift', which belongs to the model"),
    ],
)
def test_a_write_that_no_graph_can_do_is_refused(analysis: Callable[[Any, Any], Any], words: str) -> None:
    with pytest.raises(FmpqError, match=words):
        trace(Codec(analysis), photos())
