"""Export a rewritten graph as ONNX graphs, one for each part that runs between entropy coding steps."""

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from fmpq_fx.coding.conversion import quantized_model, with_exact_path
from fmpq_fx.models.identity import identity_of
from fmpq_fx.onnx.example import Example, check_runs, example_images
from fmpq_fx.onnx.exporting import exportable, onnx_of_parts
from fmpq_fx.onnx.forms import FORMS, in_form, note_arithmetic
from fmpq_fx.onnx.manifest import (
    NAME,
    VERSION,
    LayerRun,
    OnnxManifest,
    PartFile,
    replacing_folder,
    sha256,
)
from fmpq_fx.onnx.packages import OPSET, checked_opset
from fmpq_fx.onnx.part_modules import modules_of_parts
from fmpq_fx.onnx.runtimes import RUNTIMES
from fmpq_fx.passes.annotation import KEY, Arithmetic, graph_note, note_of, plan_of
from fmpq_fx.passes.lower.entropy_path import entropy_path
from fmpq_fx.passes.parts import Part, cut
from fmpq_fx.passes.plan.tables import FLOAT_BITS, Plan
from fmpq_fx.storage import fingerprint

_CONTAINER_BITS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "float32": FLOAT_BITS}


def export_onnx(
    gm: fx.GraphModule,
    folder: str | os.PathLike[str],
    *,
    form: str = "portable",
    opset: int = OPSET,
) -> OnnxManifest:
    """Write ``gm`` as ONNX graphs into ``folder``, with a manifest that describes them.

    Weights are stored as integers, and inputs of layers are rounded to integers of 8 or 16 bits. Transposed
    convolutions become one convolution for each sub-position of their output, or one for all where that is faster, and
    DepthToSpace; with two different strides or an output size they stay. Batch, height and width are dynamic.
    Convolutions whose input and weights have up to 8 bits can run in integers; the manifest lists them, and the reason
    for each of the others.

    Each installed runtime loads each graph and runs it on images before ``folder`` appears. It is an error if no
    runtime computes a graph as torch does. If only some do, or none is installed, a warning and the manifest say so.

    Args:
        gm: a graph from :func:`fmpq_fx.prepare` or :func:`fmpq_fx.rewrite`, trained further or not. It is not modified.
        folder: the folder to make; an export in it is replaced.
        form: the form of layers. "portable": QuantizeLinear and DequantizeLinear around ordinary layers, which every
            runtime reads. "onnxruntime": products of integer matrices, with which ONNX Runtime is faster on CPUs, for
            weights of up to 15 bits.
        opset: the opset of ONNX, at least 21.

    Returns:
        the manifest; printed, it is a table of the layers.

    Raises:
        FmpqError: onnx is not installed, the opset is too old, an operation has no ONNX form or no runtime runs a graph
            as torch does (no file is left then), ``folder`` holds something else, or ``gm`` carries no plan.
        FileNotFoundError: the folder that ``folder`` is to be in does not exist.
        ValueError: there is no such ``form``.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; pass one of {', '.join(map(repr, FORMS))}")
    plan, opset = plan_of(gm), checked_opset(opset)
    channels = 3 if plan.example is None else plan.example[0]
    x = example_images(channels)
    codec = quantized_model(gm).cpu().float()
    # Modules are matched before the entropy path is made exact, since an exact path rounds differently.
    modules = modules_of_parts(codec, gm, x[:1])
    fingerprints = [fingerprint.of_codec(codec)]
    fingerprints.append(fingerprint.of_codec(with_exact_path(codec, entropy_path(gm), True)))
    noted = copy.deepcopy(gm)
    noted.meta.pop(KEY)  # the model, which is not exported
    note_arithmetic(noted.cpu().float().eval(), form)
    exported, stored = in_form(noted, form)
    values = Example(noted, x).values
    parts = exportable(cut(noted), values)
    with replacing_folder(folder) as temporary:
        starts = {entry for _, entry in modules.values()}
        graphs = onnx_of_parts(exported, parts, values, opset, starts)
        files = [_written(part, graphs[part.name], modules.get(part.name), temporary) for part in parts]
        runtimes = list(RUNTIMES) if form == "portable" else [form]
        checked_with, failures = check_runs(noted, parts, channels, temporary, runtimes)
        layers = _layers(noted, plan, stored)
        here = {layer.site for layer in layers if layer.part is not None}
        manifest = OnnxManifest(
            version=VERSION,
            model=identity_of(graph_note(gm).model),
            fingerprints=tuple(fingerprints),
            form=form,
            opset=opset,
            parts=tuple(replace(file, unusable=failures[file.name]) for file in files),
            layers=layers,
            nominal_bytes=sum(s.bytes_at(plan.bits[s.name]) for s in plan.sites if s.name in here),
            checked_with=checked_with,
        )
        manifest.save(temporary / NAME)
    return manifest


def _written(part: Part, model: Any, module: tuple[str, str] | None, folder: Path) -> PartFile:
    """Write the ONNX graph of ``part`` into ``folder``."""
    path = folder / f"{part.name}.onnx"
    path.write_bytes(model.SerializeToString())
    inputs, outputs = (
        {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in of
        }
        for of in (model.graph.input, model.graph.output)
    )
    return PartFile(
        part.name, path.name, sha256(path), path.stat().st_size, inputs, outputs, *(module or (None, None))
    )


def _layers(gm: fx.GraphModule, plan: Plan, stored: Mapping[str, str]) -> tuple[LayerRun, ...]:
    """Return a record of how each site runs, in the order of the plan."""
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
