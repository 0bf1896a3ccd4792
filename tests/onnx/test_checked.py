"""Graphs are there only if ONNX Runtime runs them as torch does, and stay beside the file that they are of."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, fx

import fmpq_fx
from conftest import small_model
from fmpq_fx import FmpqError, OnnxManifest
from support.coded_models import graph_of
from support.traced_models import Codec

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from fmpq_fx.onnx import codec as onnx_codec  # noqa: E402  (after what it needs is known to be there)
from fmpq_fx.onnx import ops  # noqa: E402


def prepared(x: Tensor, bits: int = 8) -> fx.GraphModule:
    model = Codec(lambda m, x: m.relu(m.conv(x)))
    return fmpq_fx.prepare(model, bits / 32, calibration=x, bits=[bits], planner="uniform")


def no_kernel(graph: Any, node: fx.Node, x: str, inplace: bool = False) -> str:
    """Pad in 16 bits, which is valid ONNX."""
    short = graph.add("Cast", [x], to=onnx.TensorProto.INT16)
    padded = graph.add("Pad", [short, graph.constant([0, 0, 1, 0, 0, 0, 0, 0])])
    return str(graph.add("Cast", [padded], to=onnx.TensorProto.FLOAT))


def nearly(graph: Any, node: fx.Node, x: str, inplace: bool = False) -> str:
    """Return a ReLU that lets a tenth of what is negative through."""
    return str(graph.add("LeakyRelu", [x], alpha=0.1))


def smaller(graph: Any, node: fx.Node, x: str, inplace: bool = False) -> str:
    """Return the mean of each channel."""
    return str(graph.add("ReduceMean", [x, graph.constant([2, 3])]))


@pytest.mark.parametrize(
    ("relu", "reason"),
    [
        (no_kernel, r"ONNX Runtime \S+ does not run it: .*Pad"),
        (nearly, "makes something else of an image: mul differs by"),
        (smaller, r"mul has the shape \(1, 3, 1, 1\) instead of \(1, 3, 128, 128\)"),
    ],
    ids=["no kernel", "another function", "another shape"],
)
def test_a_graph_that_cannot_be_used_is_not_written(
    relu: Any, reason: str, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops.OPERATIONS, "relu", relu)
    gm = prepared(x)
    with pytest.raises(FmpqError, match=f"the ONNX graph of analysis cannot be used. .*{reason}"):
        fmpq_fx.export_onnx(gm, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_manifest_says_that_nothing_ran(
    x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = prepared(x)
    manifest = fmpq_fx.export_onnx(gm, tmp_path / "checked")
    assert manifest.checked_with == runtime.__version__
    assert f"ONNX Runtime {runtime.__version__} runs them" in str(manifest)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="no runtime has run the ONNX graphs"):
        manifest = fmpq_fx.export_onnx(gm, tmp_path / "not")
    assert manifest.checked_with is None
    assert OnnxManifest.of_folder(tmp_path / "not") == manifest
    assert "no runtime has run them" in str(manifest)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the folders that a load exported to."""
    made: list[Any] = []
    export = onnx_codec.export_onnx

    def counted(gm: fx.GraphModule, folder: Any) -> OnnxManifest:
        made.append(folder)
        return export(gm, folder)

    monkeypatch.setattr(onnx_codec, "export_onnx", counted)
    return made


def test_graphs_stay_beside_the_file(
    x: Tensor, tmp_path: Path, exports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, beside = tmp_path / "model.fmpq", tmp_path / "model.fmpq.onnx"

    def coded() -> bytes:
        return fmpq_fx.encode(fmpq_fx.load_codec(file, backend="onnxruntime", threads=1), x[0])

    fmpq_fx.save(graph_of(small_model("bmshj2018-hyperprior"), x, bits=9), file)
    first = coded()
    assert OnnxManifest.of_folder(beside).checked_with == runtime.__version__
    assert coded() == first
    assert len(exports) == 1
    # Graphs that are not whole, those of another runtime, and another model under that name are exported again.
    (beside / "synthesis.onnx").unlink()
    assert coded() == first
    assert len(exports) == 2
    monkeypatch.setattr(runtime, "__version__", "99.0")
    assert coded() == first
    assert OnnxManifest.of_folder(beside).checked_with == "99.0"
    fmpq_fx.save(graph_of(small_model("bmshj2018-hyperprior"), x, bits=6), file)
    assert coded() != first
    assert len(exports) == 4
    # What is no export is left alone.
    shutil.rmtree(beside)
    beside.write_text("a user's own")
    coded()
    assert len(exports) == 5
    assert beside.read_text() == "a user's own"
    assert {path.name for path in tmp_path.iterdir()} == {file.name, beside.name}
