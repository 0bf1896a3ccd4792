"""Run a graph once, and afterwards only the nodes that are computed from a changed layer.

::

    x ── g_a.0 ── g_a.1 ── y ── round ── y_hat ── g_s.0 ── x_hat
                           │               │
                           └─ h_a.0 ── … ──┴── likelihoods

Let ``g_a.1`` be changed. Everything to its right is downstream. These nodes also read the output of ``g_a.0``, which
the first run kept, or which is computed again from kept values (:meth:`IncrementalInterpreter.prepare`). A rerun goes
through the nodes in order and runs a node if one of its inputs changed. If the new value equals the kept one, as
rounded latents often do, the node counts as unchanged: with ``h_a.0`` changed, ``y_hat`` is the same, so the image is
not computed. The values are those of full runs, bit for bit.

Between two calls an interpreter is in one of two states::

                 rerun(site, remember=True)
      settled ──────────────────────────────> tried
         ^                                      │
         └── accept(): the change stays ────────┤
         └── any other rerun: it was dropped ───┘

- *settled*: ``kept`` has values of the graph with all accepted changes.
- *tried*: ``kept`` is the same; ``changed`` names the nodes whose values differ after the change, and ``tried`` has the
  new values that ``kept`` may take. Accepting drops the ``changed`` nodes from ``kept`` and adds the values in
  ``tried``.
"""

from collections import ChainMap, Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from fmpq_fx.passes.annotation import note_of
from fmpq_fx.passes.measure.groups import Group
from fmpq_fx.passes.measure.kept_values import Budget, KeptValues, value_bytes

UNCHANGED = object()
"""Stands in an output for a value that the change did not alter."""


@dataclass(frozen=True)
class Downstream:
    """The nodes that are computed from a group of sites, and the other nodes that they read."""

    starts: frozenset[fx.Node]  # the nodes that run the sites
    nodes: tuple[fx.Node, ...]  # these and all nodes that are computed from them, in order
    reads: frozenset[fx.Node]  # the other nodes whose values these read

    @cached_property
    def last_reads(self) -> Mapping[fx.Node, tuple[fx.Node, ...]]:
        """By node: the values that it reads and no later one of :attr:`nodes` does."""
        return _last_reads(self.nodes)


def find_downstream(gm: fx.GraphModule, groups: Collection[Group] | None = None) -> dict[Group, Downstream]:
    """Return the nodes downstream of each group of sites.

    Args:
        gm: a traced graph whose sites :func:`fmpq_fx.passes.sites.find_sites` marked.
        groups: the groups of sites that are changed; None is each site alone, in the order of the graph.
    """
    runs: dict[str, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        for site in note_of(node).sites:
            runs.setdefault(site, set()).add(node)
    inputs = {node: [s for s in node.all_input_nodes if not _is_given(s)] for node in gm.graph.nodes}
    return {
        group: _downstream(inputs, frozenset().union(*(runs[site] for site in group)))
        for group in (((site,) for site in runs) if groups is None else groups)
    }


def _downstream(inputs: Mapping[fx.Node, Sequence[fx.Node]], starts: frozenset[fx.Node]) -> Downstream:
    below = set(starts)
    reads: set[fx.Node] = set()
    for node, sources in inputs.items():
        if node in below or not below.isdisjoint(sources):
            below.add(node)
            reads.update(sources)
    return Downstream(starts, tuple(filter(below.__contains__, inputs)), frozenset(reads - below))


def _last_reads(nodes: Sequence[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    reader = {source: node for node in nodes for source in node.all_input_nodes}  # the last one stays
    return {node: tuple(s for s in node.all_input_nodes if reader[s] is node) for node in nodes}


def _is_given(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


class IncrementalInterpreter(fx.Interpreter):
    """Runs a graph once, keeping values of nodes, and then only the nodes that are computed from a change.

    Example::

        interpreter = IncrementalInterpreter(gm, find_downstream(gm), Budget(2**30))
        before = interpreter.run_once(x)
        with substituted(gm, {"g_a.0": quantized}):
            after = interpreter.rerun(("g_a.0",))

    Within the budget it keeps the values that reruns read, and values that are no larger than the images: these are
    latents, which may be equal after rounding. Larger values never are, in practice.

    Args:
        gm: a graph without in-place operations, as :func:`fmpq_fx.passes.trace.trace` records it.
        downstream: the downstream part of each group of sites that may be changed.
        budget: the memory for node values.
    """

    def __init__(self, gm: fx.GraphModule, downstream: Mapping[Group, Downstream], budget: Budget):
        super().__init__(gm, garbage_collect_values=False)
        self.downstream = dict(downstream)
        self._read = frozenset[fx.Node]().union(*(below.reads for below in downstream.values()))
        self._uses = Counter(node for below in downstream.values() for node in (*below.nodes, *below.reads))
        self.kept = KeptValues(budget)  # values of the graph with all accepted changes
        self.tried = KeptValues(budget)  # values of the last rerun, which may be accepted
        self.changed: set[fx.Node] = set()  # nodes whose values the last rerun changed
        self._budget = budget
        self._given: dict[fx.Node, Any] = {}  # inputs and parameters
        self._small = 0  # bytes up to which values are compared

    def run_once(self, x: Tensor) -> Any:
        """Return the output for ``x``, (B, C, H, W), and keep values.

        Raises:
            ValueError: the budget does not hold the values that a rerun of some group reads.
        """
        self.kept.clear()
        self._small = x.nbytes
        self._given = {}
        self.args_iter = iter((x,))
        fresh: dict[fx.Node, Any] = {}
        self.env = ChainMap(fresh, self._given)  # type: ignore[assignment]
        nodes = list(self.graph.nodes)
        last_reads = _last_reads(nodes)
        sizes: dict[fx.Node, int] = {}
        for node in nodes:
            value = self.run_node(node)
            (self._given if _is_given(node) else fresh)[node] = value
            if node in self._read or self._is_small(value):
                sizes[node] = value_bytes(value)
                if not _is_given(node):
                    self.kept.offer(node, value)
            for source in last_reads[node]:
                fresh.pop(source, None)
        needs = {group: sum(sizes[node] for node in below.reads) for group, below in self.downstream.items()}
        if needs:
            most = max(needs, key=needs.__getitem__)
            self._budget.check(needs[most], self._what(most, x))
        self.env = {}  # it would hold values that are not kept
        return value

    def rerun(self, group: Group, *, remember: bool = False) -> Any:
        """Return the output now that ``group`` is changed, with :data:`UNCHANGED` in place of unchanged values.

        Args:
            group: one of the groups that may be changed.
            remember: whether the change may be accepted (:meth:`accept`) afterwards.
        """
        below = self.downstream[group]
        fresh: dict[fx.Node, Any] = {}
        self.env = ChainMap(fresh, self.kept.values, self._given)  # type: ignore[assignment]
        self.changed = set()
        self.tried.clear()
        output: Any = UNCHANGED
        for node in below.nodes:
            if node in below.starts or not self.changed.isdisjoint(node.all_input_nodes):
                if node.op == "output":
                    output = fx.node.map_arg(node.args[0], self._changed_value)
                    break
                self._recompute([source for source in node.all_input_nodes if source not in self.env])
                value = self.run_node(node)
                if not (node in self.kept.values and _equal(value, self.kept.values[node])):
                    self.changed.add(node)
                    fresh[node] = value
                    if remember and (node in self._read or self._is_small(value)):
                        self.tried.offer(node, value)
            for source in below.last_reads[node]:
                fresh.pop(source, None)
        self.env = {}  # it would hold values that are not kept
        return output

    def prepare(self, group: Group, x: Tensor) -> None:
        """Keep the values that reruns of ``group`` read. They are the same before and after ``group`` is changed."""
        reads = self.downstream[group].reads
        missing = [node for node in reads if node not in self.kept.values]
        if not missing:
            return
        self.env = ChainMap({}, self.kept.values, self._given)  # type: ignore[assignment]
        self._recompute(missing)
        self.kept.demand({node: self.env[node] for node in reads}, self._what(group, x))
        self.env = {}

    def accept(self) -> None:
        """Take over the change of the last rerun, made with ``remember``: it is part of the graph from now on."""
        for node in self.changed:
            self.kept.drop(node)
        accepted = dict(self.tried.values)
        self.tried.clear()
        for node, value in accepted.items():
            self.kept.offer(node, value)

    def forget(self, group: Group) -> None:
        """Drop the values that are kept for reruns of ``group`` alone: it will not be changed again."""
        below = self.downstream.pop(group)
        for node in (*below.nodes, *below.reads):
            self._uses[node] -= 1
            if not self._uses[node]:
                self.kept.drop(node)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module that is registered under ``target`` now, not the one of the first run."""
        return self.fetch_attr(target)(*args, **kwargs)

    def _recompute(self, wanted: Collection[fx.Node]) -> None:
        """Compute the values of ``wanted``, which did not change, from those in ``env``, and add them to it."""
        missing: set[fx.Node] = set()
        open_nodes = list(wanted)
        while open_nodes:
            node = open_nodes.pop()
            missing.add(node)
            open_nodes += [s for s in node.all_input_nodes if s not in self.env and s not in missing]
        if not missing:
            return
        nodes = [node for node in self.graph.nodes if node in missing]
        last_reads = _last_reads(nodes)
        for node in nodes:
            self.env[node] = self.run_node(node)
            for source in last_reads[node]:
                if source in missing and source not in wanted:
                    del self.env[source]

    def _changed_value(self, node: fx.Node) -> Any:
        return self.env[node] if node in self.changed else UNCHANGED

    def _is_small(self, value: Any) -> bool:
        return value_bytes(value) <= self._small

    def _what(self, group: Group, x: Tensor) -> str:
        return f"what {', '.join(group)!r} reads for {len(x)} images of {x.size(-1)} x {x.size(-2)}"


def _equal(a: Any, b: Any) -> bool:
    """Compare two values of a node exactly, tensors inside containers included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or a.equal(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
