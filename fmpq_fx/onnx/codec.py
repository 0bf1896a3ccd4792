"""A codec whose transforms run in another runtime than torch.

The parts that decide how symbols are coded (entropy models, hyper-synthesis, context prediction, entropy parameters)
stay in torch, so that every backend decodes the files of every other. An analysis with other rounding makes another
bitstream, but any decoder reads it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import fx, nn

from fmpq_fx.coding.codec import Codec, codec_of, with_settings
from fmpq_fx.coding.codec_fingerprint import fingerprint_of
from fmpq_fx.errors import FmpqError
from fmpq_fx.onnx.export import export_onnx
from fmpq_fx.onnx.manifest import NAME, OnnxManifest, PartFile, replacing_folder
from fmpq_fx.onnx.packages import package
from fmpq_fx.onnx.runtimes import RUNTIMES

BACKENDS = ("torch", *RUNTIMES)

TRANSFORMS = ("analysis", "hyper_analysis", "synthesis")
"""The parts that a runtime runs; none of them decides how symbols are coded."""


def with_sessions(
    codec: nn.Module,
    folder: str | os.PathLike[str],
    *,
    backend: str = "onnxruntime",
    threads: int | None = None,
    **options: Any,
) -> Codec:
    """Return ``codec`` with its transforms run by another runtime, from the graphs in ``folder``.

    The result shares everything with ``codec``, which is not changed. It has the same modules, weights, state and
    fingerprint; only other modules run in the places of its transforms.

    Args:
        codec: a codec from :func:`fmpq_fx.convert` or :func:`fmpq_fx.load_codec`.
        folder: the folder that :func:`fmpq_fx.export_onnx` wrote for the same model.
        backend: "onnxruntime" or "openvino".
        threads: the number of threads of the runtime; None is as many as torch uses.
        options: options of the runtime. ONNX Runtime has ``providers``, a list of its names for them: the first that
            can compute an operation does. OpenVINO has ``precision``, "f32" or "bf16", for operations that are not
            integer.

    Raises:
        FmpqError: the runtime is not installed, ``folder`` holds no export or one of another model, no transform is a
            module of ``codec``, or ``codec`` cannot code.
        TypeError: the runtime has no such option.
        ValueError: ``threads`` is below 1, ONNX Runtime has no such providers, or OpenVINO no such precision.
    """
    runtime = RUNTIMES[backend]
    runtime.version()
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
    for part in run:
        if backend in part.unusable:
            raise FmpqError(f"{backend} cannot run the {part.name} of {folder}: {part.unusable[backend]}")
    sessions = {
        str(part.module): runtime(_from_entry(Path(folder), part), threads, **options) for part in run
    }
    return with_settings(coder, backend=sessions)


def exported_with_sessions(
    codec: nn.Module,
    graph: Callable[[], fx.GraphModule],
    file: str | os.PathLike[str],
    *,
    graphs: str | os.PathLike[str] | None = None,
    backend: str = "onnxruntime",
    **options: Any,
) -> Codec:
    """Return :func:`with_sessions` of ``codec``; export the graphs first if there are none yet.

    Args:
        codec: the codec that ``graph()`` is converted into.
        graph: returns the rewritten graph; it is called only if there is something to export.
        file: the model file that ``codec`` is from.
        graphs: the folder that :func:`fmpq_fx.export_onnx` wrote, or is to write. None is a folder beside ``file``: its
            name with ".onnx" behind it (or ".onnxruntime", for ONNX Runtime's own form). Its graphs are replaced when
            ``file`` or the version of the runtime has changed. If it cannot be written, or holds other files, the
            export is not kept.
        backend: as for :func:`with_sessions`.
        options: ``threads`` and other options of the runtime.
    """
    version = RUNTIMES[backend].version()
    form = "onnxruntime" if backend == "onnxruntime" and not options.get("providers") else "portable"

    def run(folder: str | os.PathLike[str]) -> Codec:
        return with_sessions(codec, folder, backend=backend, **options)

    if graphs is not None:
        if not (Path(graphs) / NAME).is_file():
            export_onnx(graph(), graphs, form=form)
        return run(graphs)
    beside = Path(f"{os.fspath(file)}.{'onnx' if form == 'portable' else form}")
    with suppress(FmpqError, OSError):
        manifest = OnnxManifest.of_folder(beside)
        if (
            manifest.checked_with.get(backend) == version
            and fingerprint_of(codec_of(codec)) in manifest.fingerprints
        ):
            return run(beside)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "onnx"
        export_onnx(graph(), place, form=form)
        with suppress(FmpqError, OSError), replacing_folder(beside) as kept:
            shutil.copytree(place, kept, dirs_exist_ok=True)
        return run(place)


def _from_entry(folder: Path, part: PartFile) -> bytes:
    """Return the graph of ``part`` from the value at which its module begins."""
    data = (folder / part.file).read_bytes()
    if part.entry in part.inputs and len(part.inputs) == 1:
        return data
    onnx = package("onnx")
    extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(onnx.load_from_string(data)))
    serialized: bytes = extractor.extract_model([part.entry], list(part.outputs)).SerializeToString()
    return serialized
