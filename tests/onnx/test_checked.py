"""Graphs are there only if a runtime runs them as torch does; what one cannot run is said."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, OnnxManifest
from support.coded_models import graph_of
from support.traced_models import Codec

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from fmpq_fx.onnx import export  # noqa: E402  (after what it needs is known to be there)
from fmpq_fx.onnx.example import SIZES, check_runs  # noqa: E402
from fmpq_fx.onnx.exporting import onnx_of_parts  # noqa: E402
from fmpq_fx.onnx.runtimes import OpenVinoSession  # noqa: E402


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made: fx.GraphModule = graph_of(Codec(lambda m, x: m.relu(m.conv(x))), x, fixed={"conv": None})
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


def test_graphs_that_are_checked_on_one_size_alone_come_with_a_warning(tmp_path: Path) -> None:
    class OneWidth(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            torch._assert(x.size(-1) == SIZES[0][-1], "this model is made for one width")
            return {"x_hat": x, "likelihoods": {"y": x}}

    with pytest.warns(UserWarning, match=r"checked on images of one size alone.*made for one width"):
        check_runs(fx.symbolic_trace(OneWidth()), [], 3, tmp_path, ["onnxruntime"])
