"""What stands on a graph and on its nodes is one record each, of known fields, and is checked when it is written."""

from typing import Any

import pytest
from torch import fx, nn

from fmpq_fx import FmpqError
from fmpq_fx.passes.annotation import (
    Arithmetic,
    GraphNote,
    NodeNote,
    annotate,
    annotate_graph,
    annotate_sites,
    graph_note,
    note_of,
    plan_of,
)


@pytest.fixture
def gm() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)))


def layers(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_module"]


def test_fields_are_added_one_by_one(gm: fx.GraphModule) -> None:
    first, second = layers(gm)
    assert note_of(first) == NodeNote()
    annotate(first, sites=("0",))
    annotate(second, sites=("1",))
    annotate_sites(gm, bits={"0": 4, "1": None}, zeta={"0": {4: 0.1}, "1": {4: 0.2}})
    annotate(second, arithmetic=Arithmetic("float32", "it is float"))
    assert note_of(first) == NodeNote(("0",), {"0": 4}, {"0": {4: 0.1}})
    assert note_of(second) == NodeNote(
        ("1",), {"1": None}, {"1": {4: 0.2}}, Arithmetic("float32", "it is float")
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sites": ("0", "0")}, ValueError, "each stands there once"),
        ({"sites": ("0",), "bits": {"1": 4}}, ValueError, r"bits are of the sites \['1'\]"),
        ({"zeta": {"0": {4: 0.1}}}, ValueError, r"the node runs \[\]"),
        ({"arithmetic": "int8"}, TypeError, "arithmetic is a str, expected Arithmetic"),
        ({"size": 4}, TypeError, "size"),
    ],
)
def test_wrong_notes_of_a_node_are_refused(
    gm: fx.GraphModule, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        annotate(layers(gm)[0], **fields)
    assert note_of(layers(gm)[0]) == NodeNote()


@pytest.mark.parametrize("fields", [{"plan": {}}, {"history": "long"}, {"tables_of": 4}, {"model": None}])
def test_wrong_notes_of_a_graph_are_refused(gm: fx.GraphModule, fields: dict[str, Any]) -> None:
    model = nn.Identity()
    annotate_graph(gm, model=model)
    with pytest.raises(TypeError, match=next(iter(fields))):
        annotate_graph(gm, **fields)
    assert graph_note(gm) == GraphNote(model)


def test_a_graph_of_someone_else_carries_no_plan(gm: fx.GraphModule) -> None:
    for read in (graph_note, plan_of):
        with pytest.raises(FmpqError, match="carries no plan: pass what"):
            read(gm)
    annotate_graph(gm, model=nn.Identity())
    with pytest.raises(FmpqError, match="carries no plan: pass what"):
        plan_of(gm)
    with pytest.raises(FmpqError, match=r"this DataParallel carries no plan: .*which is its \.module here"):
        plan_of(nn.DataParallel(gm))
