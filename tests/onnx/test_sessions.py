"""Codecs of model files run by any backend, with graphs that stay beside the file that they are of."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import compressai.models as zoo
import pytest
import torch
from torch import Tensor, fx

import fmpq_fx
from fmpq_fx import FmpqError, OnnxManifest
from fmpq_fx.cli.main import main
from fmpq_fx.images import reading
from support.coded_models import graph_of
from support.traced_models import lively

pytest.importorskip("onnxscript", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from fmpq_fx.onnx import codec as onnx_codec  # noqa: E402  (after what it needs is known to be there)


def graph(bits: int) -> fx.GraphModule:
    """Return a model whose convolutions have channels enough to run as integer products; some of them do."""
    kept = dict.fromkeys(("g_a.2", "g_a.4", "g_s.2", "g_s.4"))  # float, which is exported faster
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made: fx.GraphModule = graph_of(lively(lambda: zoo.FactorizedPriorReLU(16, 16)), x, bits=bits, fixed=kept)
    return made


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model.fmpq and, in graphs/, its export in the form of ONNX Runtime."""
    folder = tmp_path_factory.mktemp("shipped")
    fmpq_fx.save(graph(10), folder / "model.fmpq")
    command = ["export", "onnx", str(folder / "model.fmpq"), "--out", str(folder / "graphs")]
    assert main([*command, "--form", "onnxruntime"]) == 0
    return folder


def test_a_model_file_runs_by_any_backend(
    shipped: Path, x: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, graphs, photos = shipped / "model.fmpq", shipped / "graphs", tmp_path / "photos"
    photos.mkdir()
    reading.write(x[0], photos / "x.png")
    manifest = OnnxManifest.of_folder(graphs)
    assert manifest.form == "onnxruntime"
    twice = [layer for layer in manifest.layers if "twice" in layer.why]
    assert twice
    assert all(layer.bits == 10 and layer.runs == "int8" for layer in twice)
    codec = fmpq_fx.load_codec(model, backend="onnxruntime", graphs=graphs, threads=1)
    data = fmpq_fx.encode(codec, x[0])
    assert fmpq_fx.decode(fmpq_fx.load_codec(model), data).shape == (3, 64, 64)
    backend = ["--backend", "onnxruntime", "--graphs", str(graphs)]
    command = ["evaluate", str(model), str(photos), *backend, "--threads", "1"]
    assert main([*command, "--providers", "CPUExecutionProvider"]) == 0
    assert "x.png" in capsys.readouterr().out
    coded, image = str(tmp_path / "x.fmi"), str(tmp_path / "x.png")
    assert main(["encode", str(photos / "x.png"), "-o", coded, "-m", str(model), *backend]) == 0
    assert main(["decode", coded, "-o", image, "-m", str(model), *backend]) == 0
    assert reading.read(Path(image)).shape == (3, 64, 64)
    assert main(["evaluate", "sample", str(photos), "--backend", "onnxruntime"]) == 2
    assert "runs model files" in capsys.readouterr().err
    with pytest.raises(ValueError, match="backend is 'tpu'"):
        fmpq_fx.load_codec(model, backend="tpu")


@pytest.fixture
def exports(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the folders that a load exported to; each export is a copy of one, which takes no time."""
    made: list[Any] = []

    def counted(gm: fx.GraphModule, folder: Any, *, form: str) -> None:
        made.append(folder)
        shutil.copytree(shipped / "graphs", folder)
        manifest = OnnxManifest.of_folder(folder)
        assert manifest.form == form
        replace(manifest, checked_with={"onnxruntime": runtime.__version__}).save(folder / "manifest.json")

    monkeypatch.setattr(onnx_codec, "export_onnx", counted)
    return made


def test_graphs_stay_beside_the_file(
    shipped: Path, x: Tensor, tmp_path: Path, exports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, beside = tmp_path / "model.fmpq", tmp_path / "model.fmpq.onnxruntime"

    def coded() -> bytes:
        return fmpq_fx.encode(fmpq_fx.load_codec(file, backend="onnxruntime", threads=1), x[0])

    shutil.copy(shipped / "model.fmpq", file)
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
    fmpq_fx.save(graph(6), file)
    with pytest.raises(FmpqError, match="the export of another"):
        coded()  # of the copy
    assert len(exports) == 5
