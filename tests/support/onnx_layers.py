"""Layers in ONNX, many in one export, since each export takes seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.onnx.exporting import onnx_of_parts
from fmpq_fx.onnx.forms import in_form, note_arithmetic
from fmpq_fx.onnx.packages import OPSET
from fmpq_fx.onnx.runtimes import RUNTIMES
from fmpq_fx.passes.annotation import Arithmetic, note_of
from fmpq_fx.passes.parts import Part


@dataclass(frozen=True)
class Exported:
    """Layers one after another that were exported, and an input of theirs."""

    model: bytes
    x: Tensor
    expected: Tensor  # what torch computes, its GDNs with their input unrounded
    kinds: list[str]  # of the operations of the graph
    arithmetic: Arithmetic  # of the first layer
    stored: str  # its integers

    def found(self, runtime: str = "onnxruntime") -> Tensor:
        """Return what a runtime computes."""
        found: Tensor = RUNTIMES[runtime](self.model, 1)(self.x)
        return found


def exported(layers: Mapping[str, tuple[nn.Module, Tensor]], form: str = "portable") -> dict[str, Exported]:
    """Return ``layers`` in ONNX, by their names; each is a layer or an nn.Sequential, with an input."""
    graph, ends = fx.Graph(), []
    root = nn.ModuleDict({name: nn.Sequential(layer) for name, (layer, _) in layers.items()})
    for name, (layer, _) in layers.items():
        value = graph.placeholder(f"x_{name}")
        paths = [f"0.{i}" for i in range(len(layer))] if isinstance(layer, nn.Sequential) else ["0"]
        for path in paths:
            value = graph.call_module(f"{name}.{path}", (value,))
        ends.append(value)
    graph.output(tuple(ends))
    noted = note_arithmetic(fx.GraphModule(root, graph), form)
    run = _Values(noted)
    with torch.no_grad():
        run.run(*(x for _, x in layers.values()))
    parts = _parts(noted)
    twin, stored = in_form(noted, form)
    models = onnx_of_parts(twin, parts, run.values, OPSET)
    found = {}
    for name, part in zip(layers, parts, strict=True):
        first = next(node for node in part.nodes if node.op == "call_module")
        arithmetic = note_of(first).arithmetic
        assert arithmetic is not None
        found[name] = Exported(
            models[part.name].SerializeToString(),
            run.values[part.inputs[0]],
            run.values[part.outputs[0]],
            [node.op_type for node in models[part.name].graph.node],
            arithmetic,
            stored[str(first.target)],
        )
    return found


def _parts(gm: fx.GraphModule) -> list[Part]:
    """Return what is computed from each input, as a part."""
    nodes = list(gm.graph.nodes)
    starts = [index for index, node in enumerate(nodes) if node.op == "placeholder"]
    (output,) = (node for node in nodes if node.op == "output")
    return [
        Part(nodes[start].name, tuple(nodes[start + 1 : end]), (nodes[start],), (out,))
        for start, end, out in zip(starts, [*starts[1:], -1], output.args[0], strict=True)
    ]


class _Values(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]
