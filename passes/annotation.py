"""The notes of the passes on a graph and on its nodes: one record each, under one key of torch.fx's ``meta``.

Records are immutable, since a deep copy of a graph shares the contents of its nodes' ``meta`` with the original.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.history import History
from fmpq_fx.passes.plan.tables import Plan

KEY = "fmpq"
"""The key of ``node.meta`` and of ``gm.meta`` that the records stand under."""


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of an exported layer."""

    kind: str  # "int8" or "float32"
    why: str  # the reason for this kind


@dataclass(frozen=True)
class NodeNote:
    """The notes of the passes on a node.

    Raises:
        ValueError: a site is listed twice, or the bits or zeta are of other sites.
        TypeError: the arithmetic is of another type.
    """

    sites: tuple[str, ...] = ()  # the sites that the node runs
    bits: Mapping[str, int | None] = field(default_factory=dict)  # bits by site, once planned
    # Zeta by site and bits, once measured.
    zeta: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    arithmetic: Arithmetic | None = None  # the arithmetic of an exported layer

    def __post_init__(self) -> None:
        if len(set(self.sites)) < len(self.sites):
            raise ValueError(f"the sites of a node are {self.sites}; each stands there once")
        for name in ("bits", "zeta"):
            values = getattr(self, name)
            if values and set(values) != set(self.sites):
                raise ValueError(f"{name} are of the sites {list(values)}, the node runs {list(self.sites)}")
        _check_type("arithmetic", self.arithmetic, Arithmetic)


@dataclass(frozen=True)
class GraphNote:
    """The notes of the passes on a graph.

    Raises:
        TypeError: a value is of another type.
    """

    model: nn.Module  # the model whose modules the graph runs: the way back to the model's own class
    plan: Plan | None = None  # the plan of a quantized graph
    history: History | None = None  # the history of a fine-tuned graph
    tables_of: str | None = None  # fingerprint of the entropy models that CDF tables of a file belong to
    # Values that may be those of the traced example alone -> where they come from.
    frozen: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("model", nn.Module), ("plan", Plan), ("history", History), ("tables_of", str)):
            _check_type(name, getattr(self, name), kind)


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) and (value is not None or name == "model"):
        raise TypeError(f"{name} is a {type(value).__name__}, expected {kind.__name__}")


def note_of(node: fx.Node) -> NodeNote:
    """Return the note on ``node``; an empty one if there is none."""
    note: NodeNote = node.meta.get(KEY, NodeNote())
    return note


def annotate(node: fx.Node, **fields: Any) -> None:
    """Write ``fields`` of :class:`NodeNote` on ``node``; the others stay as they are."""
    node.meta[KEY] = replace(note_of(node), **fields)


def annotate_sites(gm: fx.GraphModule, **tables: Mapping[str, Any]) -> None:
    """Write each site's value, ``bits={site: value}`` for instance, on the nodes of ``gm`` that run the site."""
    for node in gm.graph.nodes:
        if sites := note_of(node).sites:
            annotate(node, **{name: {site: of[site] for site in sites} for name, of in tables.items()})


def graph_note(gm: nn.Module) -> GraphNote:
    """Return the note on ``gm``.

    Raises:
        FmpqError: there is none, because :func:`fmpq_fx.passes.trace.trace` did not make ``gm``.
    """
    note = getattr(gm, "meta", {}).get(KEY)
    if not isinstance(note, GraphNote):
        raise _no_plan(gm)
    return note


def annotate_graph(gm: fx.GraphModule, **fields: Any) -> None:
    """Write ``fields`` of :class:`GraphNote` on ``gm``; the others stay as they are."""
    note = gm.meta.get(KEY)
    gm.meta[KEY] = GraphNote(**fields) if note is None else replace(note, **fields)


def plan_of(gm: nn.Module) -> Plan:
    """Return the plan that the rewritten graph ``gm`` carries.

    Raises:
        FmpqError: ``gm`` is not the result of ``prepare`` or ``rewrite``.
    """
    plan = graph_note(gm).plan
    if plan is None:
        raise _no_plan(gm)
    return plan


def _no_plan(gm: nn.Module) -> FmpqError:
    inner = ", which is its .module here" if isinstance(gm, nn.DataParallel) else ""
    return FmpqError(
        f"this {type(gm).__name__} carries no plan: pass what fmpq_fx.prepare() or fmpq_fx.rewrite() returned{inner}"
    )
