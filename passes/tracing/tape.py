"""The graph that is being recorded: nodes, calls that get a node once a node reads them, and guards."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from fmpq_fx.passes.tracing.functions import expect
from fmpq_fx.passes.tracing.numbers import TracedFloat, TracedInt, plain, traced
from fmpq_fx.passes.tracing.sources import Lines


class Deferred:
    """A call of ``target``, a function or a method's name, that enters the graph when a node reads it.

    Sizes are such calls, and items of tuples: a forward asks for many and uses few.
    """

    __slots__ = ("args", "node", "target")

    def __init__(self, target: Any, args: tuple[Any, ...]):
        self.target, self.args = target, args
        self.node: fx.Node | None = None


Source = fx.Node | Deferred
"""The origin of a value: the node that computes it, or the call that is not in the graph yet."""

_ATTRIBUTE = object()  # the target of calls that read a parameter


class Tape:
    """Records calls into :attr:`graph`.

    Args:
        lines: finds the user's lines.
        forward: the code of the model's own forward; each node gets its running line.
    """

    def __init__(self, lines: Lines, forward: Any):
        self.graph = fx.Graph()
        self.lines = lines
        self._forward = forward
        self._deferred: dict[Any, Deferred] = {}
        self._decided: set[Source] = set()

    def call(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Return a new node; ``args`` and ``kwargs`` have nodes in the places of values."""
        node = self.graph.create_node(op, target, args, kwargs or {})
        place = self.lines.in_forward(self._forward)
        if place is not None:
            node.stack_trace = place
        return node

    def defer(self, target: Any, *args: Any) -> Deferred:
        """Return a call that enters the graph when a node reads it; equal arguments give the same call."""
        key = (target, *((type(arg), arg) for arg in args))
        if key not in self._deferred:
            self._deferred[key] = Deferred(target, args)
        return self._deferred[key]

    def defer_item(self, source: Source, key: Any) -> Deferred:
        """Return the item ``key`` of the value of ``source``; the key may be an index with nodes in it."""
        try:
            return self.defer(operator.getitem, source, key)
        except TypeError:  # slices have no hash
            return Deferred(operator.getitem, (source, key))

    def defer_attribute(self, name: str) -> Deferred:
        """Return the parameter, buffer or constant ``name``."""
        return self.defer(_ATTRIBUTE, name)

    def node(self, source: Source) -> fx.Node:
        """Return the node of ``source``."""
        if isinstance(source, fx.Node):
            return source
        if source.node is None:
            args = tuple(self.node(arg) if isinstance(arg, Deferred) else arg for arg in source.args)
            if source.target is _ATTRIBUTE:
                source.node = self.call("get_attr", args[0], ())
            else:
                op = "call_method" if isinstance(source.target, str) else "call_function"
                source.node = self.call(op, source.target, args)
        return source.node

    def number(self, value: Any, source: Source) -> Any:
        """Return ``value`` as a number that knows its ``source``; unchanged if it is no int or float."""
        return traced(value, source, self)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the result of ``function`` for numbers, as a number that knows its source."""
        return self.number(function(*map(plain, args)), self.defer(function, *map(_source, args)))

    def decide(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the answer of ``function``, which the forward decides on; the graph will expect the same answer."""
        answer = function(*map(plain, args))
        sources = [_source(arg) for arg in args]
        if len(sources) == 1 or sources[0] is not sources[1]:
            self.expect(self.defer(function, *sources), answer)
        return answer

    def pin(self, number: Any) -> Any:
        """Return ``number`` as a plain one; the graph will expect the same number."""
        if isinstance(number, TracedInt | TracedFloat):
            self.expect(number.source, plain(number))
        return plain(number)

    def expect(self, source: Source, answer: Any) -> None:
        """Have the graph check that ``source`` gives ``answer``."""
        if source not in self._decided:
            self._decided.add(source)
            self.call("call_function", expect, (self.node(source), answer, self.lines.here()))


def _source(value: Any) -> Any:
    return value.source if isinstance(value, TracedInt | TracedFloat) else plain(value)
