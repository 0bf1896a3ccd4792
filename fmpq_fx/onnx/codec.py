"""A codec whose transforms ONNX Runtime runs.

What decides how symbols are coded (entropy models, hyper-synthesis, context prediction, entropy parameters) stays in
torch, so that what one backend encodes the other decodes: an analysis that rounds otherwise makes another bitstream,
but any decoder reads it.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fmpq_fx.coding.codec import Codec, codec_of, with_settings
from fmpq_fx.coding.known import fingerprint_of
from fmpq_fx.errors import FmpqError
from fmpq_fx.onnx.export import export_onnx
from fmpq_fx.onnx.graph import OPSET, package
from fmpq_fx.onnx.manifest import NAME, OnnxManifest, PartFile

BACKENDS = ("torch", "onnxruntime")

TRANSFORMS = ("analysis", "hyper_analysis", "synthesis")
"""The parts that ONNX Runtime runs: none of them decides how symbols are coded."""


@functools.cache
def products_overflow() -> bool:
    """Say whether ONNX Runtime multiplies 8-bit matrices inexactly here.

    It does on x64 processors without VNNI instructions, which add pairs of products in 16 bits.
    """
    helper, types = package("onnx").helper, package("onnx").TensorProto
    x = np.full((16, 64), 255, np.uint8)
    weight = package("onnx").numpy_helper.from_array(np.full((64, 16), 127, np.int8), "weight")
    ends = [
        helper.make_tensor_value_info(name, kind, (16, None))
        for name, kind in (("x", types.UINT8), ("y", types.INT32))
    ]
    product = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = helper.make_graph([product], "product", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    session = package("onnxruntime").InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    return bool((y != 255 * 127 * 64).any())


class Session(nn.Module):
    """Runs an ONNX graph with one input and one output.

    Args:
        model: the serialized graph.
        threads: that ONNX Runtime computes with; None is as many as torch does.
    """

    def __init__(self, model: bytes, threads: int | None = None):
        super().__init__()
        runtime = package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if products_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")  # exact, and slower
        # Threads that wait without sleeping take the processor from torch, which runs the rest.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.arguments = model, threads
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` (B, C, H, W), with its device and dtype."""
        array = x.detach().cpu().float().contiguous().numpy()
        (out,) = self.session.run(None, {self.input: array})
        return torch.from_numpy(out).to(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """Return itself: it has no state."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the graph; a session cannot be copied."""
        return Session, self.arguments


def with_sessions(codec: nn.Module, folder: str | os.PathLike[str], *, threads: int | None = None) -> Codec:
    """Return ``codec`` with ONNX Runtime to run its transforms, with the graphs in ``folder``.

    It shares everything with ``codec``, which is not changed. Its modules stay where they are, with their weights, and
    so do its state and its fingerprint: other modules run in their places.

    Args:
        codec: what :func:`fmpq_fx.convert` or :func:`fmpq_fx.load_codec` returned.
        folder: what :func:`fmpq_fx.export_onnx` wrote for the same model.
        threads: that ONNX Runtime computes with; None is as many as torch does.

    Raises:
        FmpqError: onnxruntime is not installed, ``folder`` holds no export or one of another model, or none of its
            transforms is a module of ``codec``; or ``codec`` cannot code.
        ValueError: ``threads`` is below 1.
    """
    package("onnxruntime")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; pass 1 or more, or None for as many as torch uses")
    manifest = OnnxManifest.of_folder(folder)
    coder = codec_of(codec)
    if fingerprint_of(coder) not in manifest.fingerprints:
        raise FmpqError(
            f"{folder} is the export of another {manifest.model['class']}, or of the same before it was changed; "
            "export this one with export_onnx()"
        )
    run = [part for part in manifest.parts if part.module and part.name in TRANSFORMS]
    if not run:
        raise FmpqError(
            f"no transform of this {type(codec).__name__} is a module with one input and one output, which another "
            "backend could run in its place; make its analysis and its synthesis modules (nn.Sequential, say)"
        )
    backend = {str(part.module): Session(_from_entry(Path(folder), part), threads) for part in run}
    return with_settings(coder, backend=backend)


def exported_with_sessions(
    codec: nn.Module,
    graph: Callable[[], fx.GraphModule],
    *,
    graphs: str | os.PathLike[str] | None = None,
    threads: int | None = None,
) -> Codec:
    """Do what :func:`with_sessions` does, with ``graphs``, where ``graph()`` is exported to if there are none yet.

    Args:
        codec: what ``graph()`` is converted into.
        graph: what makes the rewritten graph; it is called only if there is something to export.
        graphs: the folder of what :func:`fmpq_fx.export_onnx` wrote, or is to write; None exports into a temporary
            one, every time, which takes a while.
        threads: that ONNX Runtime computes with.
    """
    package("onnxruntime")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "onnx" if graphs is None else Path(graphs)
        if not (place / NAME).is_file():
            export_onnx(graph(), place)
        return with_sessions(codec, place, threads=threads)


def _from_entry(folder: Path, part: PartFile) -> bytes:
    """Return the graph of ``part`` from where its module begins."""
    data = (folder / part.file).read_bytes()
    if part.entry in part.inputs and len(part.inputs) == 1:
        return data
    onnx = package("onnx")
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(onnx.load_from_string(data)))
    serialized: bytes = extractor.extract_model([part.entry], list(part.outputs)).SerializeToString()
    return serialized
