"""Threads: two that trace, and one that traces while another runs a model, do not disturb each other."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributions import Normal

from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.leaves import NetworkTracer
from support.codecs.rounding import RoundStraightThrough
from support.codecs.small import N, Small
from support.traced_models import assert_same, outputs


class Interrupted(Small):
    """Lets something else happen in the middle of its forward, the first time it runs."""

    def __init__(self, meanwhile: Callable[[], Any]) -> None:
        super().__init__()
        self.meanwhile = [meanwhile]

    def __deepcopy__(self, memo: Any) -> "Interrupted":
        twin = Interrupted(lambda: None)
        twin.meanwhile = self.meanwhile  # of all copies together
        twin.load_state_dict(self.state_dict())
        twin.train(self.training)
        return twin

    def synthesis(self, y_hat: Tensor) -> Tensor:
        while self.meanwhile:
            self.meanwhile.pop()()
        return super().synthesis(y_hat)


class Other(nn.Module):
    """Has all that tracing exchanges: modules, functions with a backward, distributions, numbers of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(N, N, 1), nn.LeakyReLU())

    def forward(self, x: Tensor) -> Tensor:
        with pytest.raises(ValueError, match="scale"):
            Normal(x, -torch.ones_like(x))
        y: Tensor = RoundStraightThrough.apply(self.inner(x) + int(x.sum()) + len(x))
        return y


def other_of(thread_result: list[Any], model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return what runs ``model`` in another thread, and waits for it."""

    def run() -> None:
        thread = threading.Thread(target=lambda: thread_result.append(model(x)))
        thread.start()
        thread.join()

    return run


def code(gm: fx.GraphModule) -> list[str]:
    return [node.format_node() or "" for node in gm.graph.nodes]


@pytest.fixture(autouse=True)
def checked_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let distributions check their arguments, which torch.compile ends for the whole process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


def test_a_model_runs_in_another_thread_while_one_is_traced() -> None:
    found: list[Tensor] = []
    model, x, image = Other(), torch.rand(2, N, 4, 4), torch.rand(1, 3, 32, 32)
    expected = model(x)
    gm = trace(Interrupted(other_of(found, model, x)).eval(), image)
    assert torch.equal(found[0], expected)
    assert code(gm) == code(trace(Interrupted(lambda: None).eval(), image))


def test_a_model_runs_in_another_thread_while_a_network_is_traced() -> None:
    class Network(nn.Module):
        def __init__(self, meanwhile: Callable[[], None]) -> None:
            super().__init__()
            self.layer, self.meanwhile = nn.Conv2d(N, N, 1), meanwhile

        def forward(self, x: Tensor) -> Tensor:
            self.meanwhile()
            y: Tensor = self.layer(x)
            return y

    found: list[Tensor] = []
    model, x = Other(), torch.rand(2, N, 4, 4)
    graph = NetworkTracer().trace(Network(other_of(found, model, x)))
    assert torch.equal(found[0], model(x))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_two_threads_trace_and_leave_torch_as_it_was() -> None:
    before, image = nn.Module.__call__, torch.rand(1, 3, 32, 32)
    begun, ended = threading.Event(), threading.Event()
    graphs: list[fx.GraphModule] = []

    def second() -> None:
        def overlap() -> None:
            begun.set()
            ended.wait(2)  # in vain where the other one goes on: it waits for this one

        graphs.append(trace(Interrupted(overlap).eval(), image))

    thread = threading.Thread(target=second)

    def start() -> None:
        thread.start()
        begun.wait(0.2)  # in vain: the other one waits for this one

    graphs.append(trace(Interrupted(start).eval(), image))
    ended.set()
    thread.join()
    assert nn.Module.__call__ is before
    for gm in graphs:
        assert_same(outputs(gm, image), outputs(Interrupted(lambda: None).eval(), image))
