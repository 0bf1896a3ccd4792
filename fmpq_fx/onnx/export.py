"""A rewritten graph as ONNX graphs, one for each part that runs between entropy coding steps."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from fmpq_fx.coding.conversion import quantized_model, with_exact_path
from fmpq_fx.errors import FmpqError
from fmpq_fx.models.identity import identity_of
from fmpq_fx.onnx.example import Example, check_runs, example_image
from fmpq_fx.onnx.graph import OPSET, OnnxGraph, checked_opset, failed, package, shape_of
from fmpq_fx.onnx.integers import run_in_integers
from fmpq_fx.onnx.manifest import (
    NAME,
    VERSION,
    LayerRun,
    OnnxManifest,
    PartFile,
    replacing_folder,
    sha256,
)
from fmpq_fx.onnx.ops import emit
from fmpq_fx.onnx.part_modules import modules_of_parts
from fmpq_fx.onnx.subpixel import subpixel
from fmpq_fx.passes.annotation import Arithmetic, graph_note, note_of, plan_of
from fmpq_fx.passes.lower.entropy_path import entropy_path
from fmpq_fx.passes.parts import Part, cut
from fmpq_fx.passes.plan.tables import FLOAT_BITS, Plan
from fmpq_fx.storage import fingerprint

_CONTAINER_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "float32": FLOAT_BITS}


def export_onnx(
    gm: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    opset: int = OPSET,
) -> OnnxManifest:
    """Write ``gm`` as ONNX graphs into ``folder``, with a manifest that says which is what.

    Convolutions whose input has up to 8 bits are computed in integers, exactly; which are, and why others are not, the
    manifest lists. Weights are stored as integers in any case. Transposed convolutions become
    convolutions and a pixel shuffle. Batch, height and width are dynamic.

    ONNX Runtime, where it is installed, loads each graph and runs it on an image before ``folder`` is there; where it
    is not, a warning and the manifest say so.

    Args:
        gm: what :func:`fmpq_fx.prepare` or :func:`fmpq_fx.rewrite` returned, trained further or not. It is not
            modified.
        folder: is made; an export that is there already is replaced.
        opset: of ONNX, at least 21.

    Returns:
        the manifest; printed, it is a table of the layers.

    Raises:
        FmpqError: onnx is not installed, the opset is too old, an operation has no ONNX form or a graph does not run as
            the torch graph does (no file is left then), ``folder`` holds something else, or ``gm`` carries no plan.
        FileNotFoundError: the folder that ``folder`` is to be in does not exist.
    """
    plan, opset = plan_of(gm), checked_opset(opset)
    x = example_image(3 if plan.example is None else plan.example[0])
    codec = quantized_model(gm).cpu().float()
    # Before its entropy path is exact, which computes what the graph does up to fixed-point rounding.
    modules = modules_of_parts(codec, gm, x)
    fingerprints = [fingerprint.of_codec(codec)]
    fingerprints.append(fingerprint.of_codec(with_exact_path(codec, entropy_path(gm), True)))
    lowered = run_in_integers(subpixel(gm).cpu().float().eval())
    example, parts = Example(lowered, x), cut(lowered)
    with replacing_folder(folder) as temporary:
        files: list[PartFile] = []
        stored: dict[str, str] = {}
        for part in parts:
            graph, file = _written(lowered, part, example.constants, temporary, opset)
            module = modules.get(part.name)
            if module is not None and len(part.outputs) == 1:
                entry = graph.values.get(module[1])
                file = replace(file, module=module[0] if entry else None, entry=entry)
            files.append(file)
            stored |= graph.stored
        layers = _layers(lowered, plan, stored)
        here = {layer.site for layer in layers if layer.part is not None}
        manifest = OnnxManifest(
            version=VERSION,
            model=identity_of(graph_note(gm).model),
            fingerprints=tuple(fingerprints),
            opset=opset,
            parts=tuple(files),
            layers=layers,
            nominal_bytes=sum(s.bytes_at(plan.bits[s.name]) for s in plan.sites if s.name in here),
            checked_with=check_runs(example, parts, temporary),
        )
        manifest.save(temporary / NAME)
    return manifest


def _written(
    gm: fx.GraphModule, part: Part, constants: Mapping[fx.Node, Tensor], folder: Path, opset: int
) -> tuple[OnnxGraph, PartFile]:
    """Write the ONNX graph of ``part`` into ``folder``."""
    onnx = package("onnx")
    graph = OnnxGraph()
    values: dict[fx.Node, Any] = {node: graph.name(node.name) for node in part.inputs}
    outputs = {node: graph.name(f"{node.name}_out") for node in part.outputs}
    for node in part.nodes:
        for read in node.all_input_nodes:
            if read not in values and read in constants:
                values[read] = graph.constant(constants[read], read.name)
        values[node] = emit(graph, gm, node, values)
    for node, name in outputs.items():
        if not isinstance(values[node], str):
            raise failed(node, "an output of a part must be one tensor")
        graph.nodes.append(onnx.helper.make_node("Identity", [values[node]], [name], name=name))
    graph.values = {node.name: name for node, name in values.items() if isinstance(name, str)}
    graph.pruned(list(outputs.values()))
    shapes = [
        {name: _dynamic(name, node) for node, name in names}
        for names in ([(node, values[node]) for node in part.inputs], outputs.items())
    ]
    infos = [
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in of.items()
        ]
        for of in shapes
    ]
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, part.name, *infos, list(graph.initializers.values())),
        opset_imports=opsets,
        producer_name="fmpq-fx",
        ir_version=onnx.helper.find_min_ir_version_for(opsets),
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of several types, which onnx does not document
        raise FmpqError(f"the ONNX graph of {part.name} is not valid: {error}") from error
    path = folder / f"{part.name}.onnx"
    path.write_bytes(model.SerializeToString())
    return graph, PartFile(part.name, path.name, sha256(path), path.stat().st_size, shapes[0], shapes[1])


def _dynamic(name: str, node: fx.Node) -> list[int | str]:
    """Return the shape of ``node`` with all but its channels dynamic."""
    shape = shape_of(node)
    words: list[int | str] = ["batch", *shape[1:2]]
    return words + [f"{name}_{dimension}" for dimension in ("height", "width", "depth")[: len(shape) - 2]]


def _layers(gm: fx.GraphModule, plan: Plan, stored: Mapping[str, str]) -> tuple[LayerRun, ...]:
    """Return how each site runs, in the order of the plan."""
    parts = {str(node.target): part.name for part in cut(gm) for node in part.nodes}
    notes = {str(node.target): note_of(node).arithmetic for node in gm.graph.nodes}
    layers = []
    for site in plan.sites:
        part, bits = parts.get(site.name), plan.bits[site.name]
        reason = "its bits are float32" if part else "inside a module that is kept whole, which torch runs"
        how = notes.get(site.name) or Arithmetic("float32", reason)
        container = stored.get(site.name, "float32")
        size = site.params * _CONTAINER_BITS[container] / 8
        layers.append(LayerRun(site.name, part, bits, how.kind, container, size, how.why))
    return tuple(layers)
