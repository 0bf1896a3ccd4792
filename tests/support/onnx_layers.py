"""Single layers in ONNX Runtime."""

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fmpq_fx.onnx.graph import OPSET, OnnxGraph, package
from fmpq_fx.onnx.integers import run_in_integers
from fmpq_fx.onnx.ops import emit
from fmpq_fx.onnx.session import Session
from fmpq_fx.onnx.subpixel import subpixel
from fmpq_fx.passes.annotation import note_of
from fmpq_fx.quant import QuantizedLayer


class Tracer(fx.Tracer):
    """Keeps quantized layers whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer) or super().is_leaf_module(m, module_qualified_name)


def in_onnx(layers: nn.Sequential, x: Tensor) -> tuple[Tensor, set[str], str]:
    """Return what ONNX Runtime makes of ``x``, the operations of the graph, and how the first layer runs."""
    gm = run_in_integers(subpixel(fx.GraphModule(layers, Tracer().trace(layers))))
    with torch.no_grad():
        ShapeProp(gm).propagate(x)
    onnx, graph, values = package("onnx"), OnnxGraph(), {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.name("x")
        elif node.op == "output":
            out = values[node.args[0]]
        else:
            values[node] = emit(graph, gm, node, values)
    graph.pruned([out])
    ends = [
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, ["batch", channels, "height", "width"]
        )
        for name, channels in (("x", x.size(1)), (out, None))
    ]
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    parts = (graph.nodes, "layers", ends[:1], ends[1:], list(graph.initializers.values()))
    model = onnx.helper.make_model(onnx.helper.make_graph(*parts), opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    kinds = {node.op_type for node in graph.nodes}
    arithmetic = next(note_of(node).arithmetic for node in gm.graph.nodes if node.op == "call_module")
    assert arithmetic is not None
    return Session(model.SerializeToString(), 1)(x), kinds, arithmetic.kind
