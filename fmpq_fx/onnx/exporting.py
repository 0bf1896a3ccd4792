"""Export parts of a graph with torch's own ONNX exporter, in one call, since each call takes long for any graph."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.onnx.packages import package
from fmpq_fx.onnx.translations import IN_PLACE, TRANSLATIONS
from fmpq_fx.passes.parts import Part
from fmpq_fx.passes.tracing.functions import numpy_scalar


class UnexportableError(FmpqError):
    """A node has no ONNX form."""


def output_name(node: fx.Node) -> str:
    """Return the name of the output that has the value of ``node``."""
    return f"{node.name}_out"


def exportable(parts: Iterable[Part], values: Mapping[fx.Node, Any]) -> list[Part]:
    """Return ``parts`` with only tensors and sizes as inputs and outputs; parts that output neither are left out.

    A part that reads another value, a shape say, computes it itself from tensors and sizes. Dtypes and devices are
    those of the example.

    Args:
        parts: parts of one graph.
        values: the values of all of its nodes on an example.
    """
    found = []
    for part in parts:
        inputs: list[fx.Node] = []
        moved: list[fx.Node] = []
        pending = list(part.inputs)
        for node in pending:  # grows
            if isinstance(values[node], _OF_THE_EXAMPLE):
                continue
            if not _is_data(values[node]):
                moved.append(node)
                pending += node.all_input_nodes
            elif node not in inputs:
                inputs.append(node)
        outputs = tuple(node for node in part.outputs if _is_data(values[node]))
        order = [*part.nodes[0].graph.nodes]
        nodes = (*sorted(set(moved), key=order.index), *part.nodes)
        if outputs:
            found.append(replace(part, nodes=nodes, inputs=tuple(inputs), outputs=outputs))
    return found


_OF_THE_EXAMPLE = (torch.dtype, torch.device)
"""Types of values that are not computed in ONNX."""


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value) is int


def onnx_of_parts(
    root: nn.Module,
    parts: Sequence[Part],
    values: Mapping[fx.Node, Any],
    opset: int,
    inner: Collection[str] = (),
) -> dict[str, Any]:
    """Return the ONNX graph of each of ``parts``, by its name.

    Its inputs have the names of their nodes, its outputs those of :func:`output_name`. All dimensions but the channels
    are dynamic, unless the graph computes with their sizes as with fixed ones.

    Args:
        root: the module whose submodules the nodes call, in the form that is exported.
        parts: the parts, as :func:`exportable` returned them.
        values: the values of all nodes on an example whose sizes are all above 1; torch takes a size of 1 for fixed.
        opset: the opset of ONNX.
        inner: names of nodes inside of parts at whose values the graph will be cut. Nothing behind such a node then
            reads values before it (for a size, say), and the value has the name of the node.

    Raises:
        FmpqError: an operation has no ONNX form; the message names node, module and line.
    """
    onnx = package("onnx")
    package("onnxscript")
    try:
        model = _Joint(root, parts, values, inner).exported(opset)
    except Exception as error:  # torch does not document the types of its errors
        *_, cause = _causes(error)
        if isinstance(cause, UnexportableError):
            raise cause from cause.__cause__
        what = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise _failed(_culprit(root, parts, values, opset), what) from error
    for name in inner:
        _join(model, f"{name}_out", name)
    extractor = onnx.utils.Extractor(model)
    graphs = {}
    for part in parts:
        ends = [[node.name for node in part.inputs], [output_name(node) for node in part.outputs]]
        graphs[part.name] = _tidied(extractor.extract_model(*ends), part.name)
    return graphs


class _Joint(nn.Module):
    """Computes parts side by side, with one input for each value that any of them reads.

    Args:
        root: the module whose submodules the nodes call.
        parts: parts of one graph.
        values: the values of all nodes on the example.
        inner: names of nodes whose values become outputs, and inputs of the nodes behind them.
    """

    def __init__(
        self,
        root: nn.Module,
        parts: Iterable[Part],
        values: Mapping[fx.Node, Any],
        inner: Collection[str] = (),
    ):
        super().__init__()
        graph = fx.Graph()
        self.inputs = list(dict.fromkeys(node for part in parts for node in part.inputs))
        self.outputs: dict[str, fx.Node] = {}
        self.examples = tuple(values[node] for node in self.inputs)
        read = {node: graph.placeholder(node.name) for node in self.inputs}
        constants: dict[fx.Node, Any] = {n: v for n, v in values.items() if isinstance(v, _OF_THE_EXAMPLE)}

        def constant(node: fx.Node) -> Any:
            if node not in constants:
                constants[node] = graph.node_copy(node, constant)
            return constants[node]

        for part in parts:
            copies = {node: read[node] for node in part.inputs}
            for node in part.nodes:
                copies[node] = graph.node_copy(node, _found(copies, constant))
                if node.name in inner and node not in part.outputs:
                    self.outputs[output_name(node)] = copies[node]
                    if node not in read:
                        read[node] = graph.placeholder(node.name)
                        self.inputs.append(node)
                        self.examples += (values[node],)
                    copies[node] = read[node]
            self.outputs |= {output_name(node): copies[node] for node in part.outputs}
        graph.output(tuple(self.outputs.values()))
        self.gm = fx.GraphModule(root, graph)

    def forward(self, *inputs: Any) -> Any:
        """Return the outputs of the parts."""
        return _Naming(self.gm).run(*inputs)

    def exported(self, opset: int) -> Any:
        """Return the ONNX graph."""
        optimizer = package("onnxscript.optimizer")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns of its own code
            program = torch.onnx.export(
                self,
                self.examples,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(tuple(map(_dynamic, self.examples)),),
                input_names=[node.name for node in self.inputs],
                output_names=list(self.outputs),
                custom_translation_table=TRANSLATIONS,
                optimize=False,  # runtimes do that when they load a graph
                verbose=False,
            )
        assert program is not None
        # Not torch's whole optimizer: it merges equal tensors, and kernels of ONNX Runtime fail on a tensor that
        # several layers read.
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        return program.model_proto


def _found(copies: Mapping[fx.Node, fx.Node], constant: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
    return lambda node: copies[node] if node in copies else constant(node)


def _dynamic(value: Any) -> Any:
    """Return the dynamic dimensions of an input: all but the channels of a tensor, or a size itself."""
    auto = torch.export.Dim.AUTO
    return {dim: auto for dim in range(value.ndim) if dim != 1} if isinstance(value, Tensor) else auto


class _Naming(fx.Interpreter):
    """Runs a graph on symbolic sizes, and names the node that fails."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.extra_traceback = False

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is numpy_scalar and hasattr(math, args[0]):  # NumPy would turn sizes into plain numbers
            target, args = getattr(math, args[0]), args[1:]
        return super().call_function(IN_PLACE.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:  # the user's code and torch's may raise anything
            raise _failed(n, str(error).strip().partition("\n")[0]) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error`` and its causes, up to an error that this file raised."""
    while error is not None:
        yield error
        error = None if isinstance(error, UnexportableError) else error.__cause__


def _culprit(root: nn.Module, parts: Sequence[Part], values: Mapping[fx.Node, Any], opset: int) -> fx.Node:
    """Return the first node of ``parts`` that makes the export fail, found by bisection."""
    nodes = [node for part in parts for node in part.nodes]
    low, high = 0, len(nodes) - 1
    while low < high:
        middle = (low + high) // 2
        try:
            _Joint(root, _up_to(parts, middle + 1, values), values).exported(opset)
        except Exception:  # as above
            high = middle
        else:
            low = middle + 1
    return nodes[low]


def _up_to(parts: Iterable[Part], count: int, values: Mapping[fx.Node, Any]) -> list[Part]:
    """Return the first ``count`` nodes of ``parts``; tensors that none of them reads are the outputs."""
    found = []
    for part in parts:
        nodes = part.nodes[:count]
        count -= len(nodes)
        ends = [n for n in nodes if isinstance(values[n], Tensor) and not set(n.users) & set(nodes)]
        if ends:
            found.append(replace(part, nodes=nodes, outputs=tuple(ends)))
    return found


def _join(model: Any, output: str, name: str) -> None:
    """Connect ``output`` of ``model``, if it has that, to the nodes that read ``name``."""
    nodes = model.graph.node
    for index, node in enumerate(nodes):
        if output in node.output:
            nodes.insert(index + 1, package("onnx").helper.make_node("Identity", [output], [name]))
            return


def _tidied(model: Any, name: str) -> Any:
    """Return ``model`` without traces of the machine that exported it, and with names for dynamic sizes."""
    graph = model.graph
    model.producer_name, graph.name = "fmpq-fx", name
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim, word in zip(value.type.tensor_type.shape.dim, _sizes_of(value.name), strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_param = word
    return model


def _sizes_of(name: str) -> Iterator[str]:
    yield "batch"
    yield from (f"{name}_{word}" for word in ("channels", "height", "width", "depth"))


def _failed(node: fx.Node, what: str) -> UnexportableError:
    module = f", module {str(node.target)!r}" if node.op == "call_module" else ""
    line = (node.stack_trace or "").strip().splitlines()
    where = f"\n  {' '.join(part.strip() for part in line)}" if line else ""
    return UnexportableError(
        f"node {node.name!r}{module} has no ONNX form here: {what}. Nothing was written. Compute it with other "
        f"operations in the model's forward, or run the model in torch{where}"
    )
