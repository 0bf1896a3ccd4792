"""The module that runs the graph of a model, or its two graphs if training does something else."""

import copy
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.passes.tracing.duplicates import copies_of_empty


class TracedModule(fx.GraphModule):
    """A GraphModule that may have a second graph, for training, over the same modules.

    Passes read and change the graph of evaluation. Both graphs find modules by name, so that a replaced layer is
    replaced in both. Copies and pickles keep both graphs, the notes on their nodes, and :attr:`meta`.

    Args:
        held: the modules and tensors that the graphs use, by name, or a module that has them.
        graph: the graph of evaluation.
        training_graph: the graph of training; None runs the graph of evaluation there too.
        name: the name of the model's class.
    """

    training_graph: fx.Graph | None = None

    def __init__(
        self, held: Mapping[str, Any] | nn.Module, graph: fx.Graph, training_graph: fx.Graph | None, name: str
    ):
        reads, more = _targets([graph]), _targets([training_graph] if training_graph else [])
        given = held if isinstance(held, Mapping) else {t: attrgetter(t)(held) for t in (*reads, *more)}
        super().__init__({target: given[target] for target in reads}, graph, name)
        for target in more:
            if target not in reads:
                _put(self, target, given[target])
        self.training_graph = training_graph

    def recompile(self) -> Any:
        """Compile the graph; calls run it, or the graph of training, and print nothing when they fail."""
        code = super().recompile()
        cls: Any = type(self)
        evaluated = cls.forward

        def forward(self: TracedModule, *args: Any) -> Any:
            if self.training_graph is None or not self.training:
                return evaluated(self, *args)
            interpreter = fx.Interpreter(self, graph=self.training_graph)
            interpreter.extra_traceback = False
            return interpreter.run(*args)

        cls.forward, cls.__call__ = forward, nn.Module.__call__
        return code

    def held(self) -> dict[str, Any]:
        """Return the modules and tensors that the graphs use, by name."""
        graphs = [self.graph] if self.training_graph is None else [self.graph, self.training_graph]
        return {target: attrgetter(target)(self) for target in _targets(graphs)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedModule":
        """Return a copy that shares nothing."""
        for address, empty in copies_of_empty(self.modules()).items():
            memo.setdefault(address, empty)
        training_graph = copy.deepcopy(self.training_graph)
        held, graph = copy.deepcopy(self.held(), memo), copy.deepcopy(self.graph)
        twin = self._class(held, graph, training_graph, self._get_name())
        twin.meta = copy.deepcopy(self.meta, memo)
        _set_modes(twin, _modes(self))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graphs node by node; fx would pickle their code, and trace it again on loading."""
        graphs = [None if graph is None else _listed(graph) for graph in (self.graph, self.training_graph)]
        return _rebuilt, (self._class, self.held(), *graphs, self._get_name(), _modes(self), self.meta)

    @property
    def _class(self) -> "type[TracedModule]":
        """The class that the source defines; fx makes a subclass for each graph."""
        return next(cls for cls in type(self).__mro__ if "<locals>" not in cls.__qualname__)


def _rebuilt(
    cls: type[TracedModule], held: Any, graph: Any, training_graph: Any, name: str, modes: Any, meta: Any
) -> TracedModule:
    trained = None if training_graph is None else _graph(training_graph)
    gm = cls(held, _graph(graph), trained, name)
    gm.meta = meta
    _set_modes(gm, modes)
    return gm


def _targets(graphs: Iterable[fx.Graph]) -> list[str]:
    """Return the names that ``graphs`` use, each once, modules before their parts."""
    nodes = [node for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")]
    return sorted(dict.fromkeys(str(node.target) for node in nodes), key=lambda target: target.count("."))


def _put(root: nn.Module, target: str, value: Any) -> None:
    path, _, name = target.rpartition(".")
    parent = root
    for part in path.split(".") if path else ():
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        parent.register_buffer(name, value)
    else:
        setattr(parent, name, value)


def _modes(root: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in root.named_modules()}


def _set_modes(root: nn.Module, modes: Mapping[str, bool]) -> None:
    for name, module in root.named_modules():
        module.training = modes[name]


class _Place(int):
    """A node, by its place in its graph."""


class _Operator(str):
    """A function of torch.ops, which cannot be pickled, by its name there."""


def _listed(graph: fx.Graph) -> list[tuple[Any, ...]]:
    place = {node: _Place(i) for i, node in enumerate(graph.nodes)}
    return [
        (
            node.name,
            node.op,
            _named(node.target),
            *fx.node.map_arg((node.args, node.kwargs), place.get),
            node.meta,
        )
        for node in graph.nodes
    ]


def _named(target: Any) -> Any:
    operator = isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    return _Operator(target) if operator else target


def _graph(listed: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def node_at(value: Any) -> Any:
        return nodes[value] if isinstance(value, _Place) else value

    for name, op, target, args, kwargs, meta in listed:
        given = fx.node.map_aggregate((args, kwargs), node_at)
        called = attrgetter(target)(torch.ops) if isinstance(target, _Operator) else target
        node = graph.create_node(op, called, *given, name=name)
        node.meta.update(meta)
        nodes.append(node)
    return graph
