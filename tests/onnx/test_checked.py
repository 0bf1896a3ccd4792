"""Graphs are there only if ONNX Runtime runs them as torch does, and stay beside the file that they are of."""

import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fmpq_fx
from conftest import small_model
from fmpq_fx import FmpqError, OnnxManifest
from support.coded_models import graph_of
from support.traced_models import Codec

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from fmpq_fx.onnx import codec as onnx_codec  # noqa: E402  (after what it needs is known to be there)
from fmpq_fx.onnx import export  # noqa: E402
from fmpq_fx.onnx.exporting import onnx_of_parts  # noqa: E402
from fmpq_fx.onnx.runtimes import OpenVinoSession  # noqa: E402


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made: fx.GraphModule = graph_of(Codec(lambda m, x: m.relu(m.conv(x))), x, bits=8)
    return made


@pytest.fixture(scope="module")
def graphs(gm: fx.GraphModule) -> dict[str, Any]:
    """Return the ONNX graphs of ``gm``, by the names of its parts."""
    kept: dict[str, Any] = {}

    def stopped(*args: Any) -> Any:
        kept.update(onnx_of_parts(*args))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "onnx_of_parts", stopped)
        with pytest.raises(KeyboardInterrupt):
            fmpq_fx.export_onnx(gm, "never")
    return kept


def no_kernel(relu: Any) -> None:
    relu.op_type = "Det"


def nearly(relu: Any) -> None:
    """Let a tenth of what is negative through."""
    relu.op_type = "LeakyRelu"
    relu.attribute.append(onnx.helper.make_attribute("alpha", 0.1))


def smaller(relu: Any) -> None:
    relu.op_type = "GlobalAveragePool"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_kernel, r"ONNX Runtime \S+ does not run it: "),
        (nearly, r"makes something else of an image: \w+ differs by"),
        (smaller, r"has the shape \(2, 3, 1, 1\) instead of \(2, 3, 128, 256\)"),
    ],
    ids=["no kernel", "another function", "another shape"],
)
def test_a_graph_that_cannot_be_used_is_not_written(
    change: Any,
    reason: str,
    gm: fx.GraphModule,
    graphs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    altered = copy.deepcopy(graphs)
    change(next(node for node in altered["analysis"].graph.node if node.op_type == "Relu"))
    monkeypatch.setattr(export, "onnx_of_parts", lambda *args: altered)
    with pytest.raises(FmpqError, match=f"the ONNX graph of analysis cannot be used. .*{reason}"):
        fmpq_fx.export_onnx(gm, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_what_one_runtime_cannot_run_is_said(
    gm: fx.GraphModule, graphs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs the extra: pip install 'fmpq-fx[openvino]'")
    monkeypatch.setattr(export, "onnx_of_parts", lambda *args: graphs)

    def broken(self: OpenVinoSession, inputs: Any) -> Any:
        raise RuntimeError("it broke")

    monkeypatch.setattr(OpenVinoSession, "run", broken)
    with pytest.warns(UserWarning, match="the ONNX graph of analysis cannot be used everywhere: OpenVINO"):
        manifest = fmpq_fx.export_onnx(gm, tmp_path / "onnx")
    assert all(set(part.unusable) == {"openvino"} for part in manifest.parts)
    assert "analysis is not to be used: OpenVINO" in str(manifest)


def test_without_a_runtime_the_manifest_says_that_nothing_ran(
    gm: fx.GraphModule, graphs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "onnx_of_parts", lambda *args: graphs)
    manifest = fmpq_fx.export_onnx(gm, tmp_path / "checked")
    assert manifest.checked_with["onnxruntime"] == runtime.__version__
    assert f"run by onnxruntime {runtime.__version__}" in str(manifest)
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="no runtime has run the ONNX graphs"):
        manifest = fmpq_fx.export_onnx(gm, tmp_path / "not")
    assert not manifest.checked_with
    assert OnnxManifest.of_folder(tmp_path / "not") == manifest
    assert "no runtime has run them" in str(manifest)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return a list of the folders that a load exported to; all but the first export is a copy of that."""
    made: list[Any] = []
    first: list[Path] = []

    def counted(gm: fx.GraphModule, folder: Any, *, form: str) -> None:
        made.append(folder)
        if not first:
            first.append(Path(tempfile.mkdtemp()) / "onnx")
            export.export_onnx(gm, first[0], form=form)
        shutil.copytree(first[0], folder)
        manifest = OnnxManifest.of_folder(folder)
        replace(manifest, checked_with={"onnxruntime": runtime.__version__}).save(folder / "manifest.json")

    monkeypatch.setattr(onnx_codec, "export_onnx", counted)
    yield made
    for folder in first:
        shutil.rmtree(folder.parent)


def test_graphs_stay_beside_the_file(
    x: Tensor, tmp_path: Path, exports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, beside = tmp_path / "model.fmpq", tmp_path / "model.fmpq.onnxruntime"

    def coded() -> bytes:
        return fmpq_fx.encode(fmpq_fx.load_codec(file, backend="onnxruntime", threads=1), x[0])

    fmpq_fx.save(graph_of(small_model("bmshj2018-hyperprior"), x, bits=9), file)
    first = coded()
    manifest = OnnxManifest.of_folder(beside)
    assert manifest.form == "onnxruntime"
    assert manifest.checked_with == {"onnxruntime": runtime.__version__}
    assert coded() == first
    assert len(exports) == 1
    # Graphs that are not whole, and those of another version, are exported again.
    (beside / "synthesis.onnx").unlink()
    assert coded() == first
    assert len(exports) == 2
    monkeypatch.setattr(runtime, "__version__", "99.0")
    assert coded() == first
    assert OnnxManifest.of_folder(beside).checked_with == {"onnxruntime": "99.0"}
    # What is no export is left alone.
    shutil.rmtree(beside)
    beside.write_text("a user's own")
    coded()
    assert len(exports) == 4
    assert beside.read_text() == "a user's own"
    assert {path.name for path in tmp_path.iterdir()} == {file.name, beside.name}
    # Those of another model under that name are exported again.
    fmpq_fx.save(graph_of(small_model("bmshj2018-hyperprior"), x, bits=6), file)
    with pytest.raises(FmpqError, match="the export of another"):
        coded()  # of the copy
    assert len(exports) == 5
