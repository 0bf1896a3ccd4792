"""Exported graphs compute what the torch graph computes, whatever the model; bad exports are refused."""

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import compressai.models as zoo
import pytest
import torch
from torch import Tensor, fx, nn

import fmpq_fx
from conftest import small_model
from fmpq_fx import FmpqError
from fmpq_fx.cli.main import main
from fmpq_fx.images import reading
from fmpq_fx.onnx.integers import run_in_integers
from fmpq_fx.onnx.subpixel import subpixel
from fmpq_fx.passes.parts import cut
from fmpq_fx.quant.layers import QuantizedGDN
from support import REPOSITORY
from support.coded_models import graph_of
from support.hyperpriors import hyperprior_of
from support.traced_models import WITH_CODEC, Codec, Make, lively

pytest.importorskip("onnx", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from fmpq_fx.onnx.codec import with_sessions  # noqa: E402  (after what it needs is known to be there)
from fmpq_fx.onnx.export import export_onnx  # noqa: E402
from fmpq_fx.onnx.manifest import OnnxManifest  # noqa: E402

sys.path.insert(0, str(REPOSITORY / "examples"))

from custom_model import TinyCodec  # noqa: E402

MODELS: dict[str, Make] = {
    "scale hyperprior": lambda: zoo.ScaleHyperprior(16, 24),
    "mean-scale hyperprior": lambda: zoo.MeanScaleHyperprior(16, 24),
    "mbt2018": lambda: zoo.JointAutoregressiveHierarchicalPriors(16, 24),
    "cheng2020-anchor": lambda: zoo.Cheng2020Anchor(16),
    "cheng2020-attention": lambda: zoo.Cheng2020Attention(16),
    "cheng2020-checkerboard": WITH_CODEC["cheng2020-checkerboard"],  # with an opaque latent codec
    "elic": WITH_CODEC["elic-official"],
    "a model of one's own": lambda: TinyCodec(channels=16, latents=16),
}

DEEP = {"cheng2020-attention", "cheng2020-checkerboard", "elic"}
"""Where 30 layers one after another round, so that steps are made small: a mistake is more than what they add up to."""


@pytest.fixture
def images() -> Tensor:
    """Two smooth images, (2, 3, 64, 128)."""
    coarse = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(64, 128), mode="bicubic").clamp(0, 1)


def prepared(images: Tensor, bits: tuple[int, ...] = (4, 8)) -> fx.GraphModule:
    """Return a small scale hyperprior, measured and planned as a user's is."""
    return fmpq_fx.prepare(
        lively(MODELS["scale hyperprior"]), 0.2, calibration=images, bits=bits, planner="optimal"
    )


def balanced(make: Make, x: Tensor) -> nn.Module:
    """Return a model whose random weights are scaled until what each layer makes of ``x`` has deviation 1.

    No layer amplifies then: a value at a tie that is rounded the other way changes others by little.
    """
    torch.manual_seed(0)
    model, done = make().eval(), set()

    def scale(layer: Any, args: Any, out: Tensor) -> Tensor:
        factor = 1.0 if layer in done else 1 / float(out.std())
        done.add(layer)
        for parameter in layer.parameters():
            parameter.mul_(factor)
        return out * factor

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    handles = [layer.register_forward_hook(scale) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model


class Values(fx.Interpreter):
    """Runs a graph and keeps what parts read and write."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.kept[n] = super().run_node(n)
        return self.kept[n]


def outputs(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # else products overflow without VNNI
    session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]


@pytest.mark.parametrize("name", MODELS)
def test_each_part_computes_what_the_graph_does(name: str, images: Tensor, tmp_path: Path) -> None:
    activation_bits = 16 if name in DEEP else 8
    gm = graph_of(balanced(MODELS[name], images), images, activation_bits, bits=8)
    manifest = export_onnx(gm, tmp_path / "onnx")
    lowered = run_in_integers(subpixel(gm))
    for x in (images, images[:1, :, :, :64]):
        values = Values(lowered)
        with torch.no_grad():
            values.run(x)
        parts = cut(lowered)
        assert [part.name for part in manifest.parts] == [part.name for part in parts]
        for part, file in zip(parts, manifest.parts, strict=True):
            inputs = {node.name: values.kept[node] for node in part.inputs}
            expected = [values.kept[node] for node in part.outputs]
            for ours, theirs in zip(outputs(tmp_path / "onnx" / file.file, inputs), expected, strict=True):
                assert ours.shape == theirs.shape
                # A value at a tie is rounded the other way now and then; that moves others by about a step.
                steps = (ours - theirs) * (2**activation_bits - 1) / (theirs.amax() - theirs.amin())
                assert steps.square().mean().sqrt() <= 4


def test_a_trained_model_on_a_photograph(tmp_path: Path) -> None:
    # Both backends read each other's bitstreams, and the image is as good; what is rounded is what was announced.
    x = fmpq_fx.samples.photos()["astronaut"][None, :, 128:256, 128:384]
    gm = fmpq_fx.prepare(fmpq_fx.samples.model(), 0.25, calibration=x, bits=[8], planner="uniform")
    manifest = export_onnx(gm, tmp_path / "onnx")
    assert {part.name: part.module for part in manifest.parts} == {
        "analysis": "g_a",
        "hyper_analysis": "h_a",
        "hyper_synthesis": "h_s",
        "synthesis": "g_s",
    }
    torch_codec: Any = fmpq_fx.convert(gm)
    onnx_codec: Any = with_sessions(fmpq_fx.convert(gm), tmp_path / "onnx", threads=1)
    quality = {}
    with torch.no_grad():
        coded = {codec: codec.compress(x) for codec in (torch_codec, onnx_codec)}
        for encoder, data in coded.items():
            for decoder in coded:
                x_hat = decoder.decompress(data["strings"], data["shape"])["x_hat"]
                quality[encoder, decoder] = -10 * (x_hat - x).square().mean().log10().item()
    assert max(quality.values()) - min(quality.values()) < 0.05
    assert abs(quality[onnx_codec, onnx_codec] - quality[torch_codec, torch_codec]) < 0.03
    # A copy runs as well, and the files of one codec are the other's.
    data = fmpq_fx.encode(copy.deepcopy(onnx_codec), x[0])
    assert fmpq_fx.decode(torch_codec, data).shape == x[0].shape


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int, tmp_path: Path) -> None:
    x = torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    gm = fmpq_fx.prepare(hyperprior_of(channels), 0.25, calibration=x, bits=[8], planner="uniform")
    export_onnx(gm, tmp_path / "onnx")
    codec = fmpq_fx.convert(gm)
    data = fmpq_fx.encode(with_sessions(codec, tmp_path / "onnx", threads=1), x)
    assert fmpq_fx.decode(codec, data).shape == x[0].shape


def test_a_model_file_runs_by_either_backend(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gm = prepared(x)
    model, graphs, photos = tmp_path / "model.fmpq", tmp_path / "graphs", tmp_path / "photos"
    fmpq_fx.save(gm, model)
    photos.mkdir()
    reading.write(x[0], photos / "x.png")
    assert main(["export", "onnx", str(model), "--out", str(graphs)]) == 0
    assert f"graphs: {graphs}" in capsys.readouterr().out
    codec = fmpq_fx.load_codec(model, backend="onnxruntime", graphs=graphs, threads=1)
    data = fmpq_fx.encode(codec, x[0])
    assert fmpq_fx.decode(fmpq_fx.load_codec(model), data).shape == (3, 64, 64)
    command = ["evaluate", str(model), str(photos), "--backend", "onnxruntime", "--graphs", str(graphs)]
    assert main([*command, "--threads", "1"]) == 0
    assert "x.png" in capsys.readouterr().out
    assert main(["evaluate", "sample", str(photos), "--backend", "onnxruntime"]) == 2
    assert "runs model files" in capsys.readouterr().err
    with pytest.raises(ValueError, match="backend is 'tpu'"):
        fmpq_fx.load_codec(model, backend="tpu")


def test_the_manifest_lists_what_runs_and_what_it_takes(images: Tensor, tmp_path: Path) -> None:
    gm = prepared(images, bits=(4, 6, 10))
    manifest = export_onnx(gm, tmp_path / "onnx")
    plan = fmpq_fx.plan_of(gm)
    containers = {4: {"int4", "uint4"}, 6: {"int8"}, 10: {"int16"}}
    for layer in manifest.layers:
        assert layer.bits == plan.bits[layer.site]
        assert layer.stored in containers[layer.bits or 0]
        norm = isinstance(gm.get_submodule(layer.site), QuantizedGDN)
        assert layer.runs == ("float32" if norm or layer.site == "g_a.0" else "int8")
        assert ("twice" in layer.why) == (layer.runs == "int8" and layer.bits == 10)
    assert manifest.nominal_bytes == plan.nominal_bytes
    assert manifest.stored_bytes >= manifest.nominal_bytes
    assert OnnxManifest.of_folder(tmp_path / "onnx") == manifest
    assert "g_a.0" in str(manifest)
    assert sum(file.stat().st_size for file in (tmp_path / "onnx").glob("*.onnx")) == manifest.bytes


@pytest.mark.parametrize("mistake", ["missing", "altered", "foreign", "version", "nothing", "another model"])
def test_an_export_that_is_not_whole_is_refused(mistake: str, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported, folder)
    part, manifest = folder / "analysis.onnx", folder / "manifest.json"
    says = {
        "missing": "lacks analysis.onnx",
        "altered": "analysis.onnx is not what",
        "foreign": "not of this export",
    }
    says |= {
        "version": "version 1",
        "nothing": "there is no manifest.json",
        "another model": "of another .*Scale",
    }
    if mistake == "missing":
        part.unlink()
    elif mistake == "altered":
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    elif mistake == "foreign":
        (folder / "other.onnx").touch()
    elif mistake == "version":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 1}))
    elif mistake == "nothing":
        manifest.unlink()
    with pytest.raises(FmpqError, match=says[mistake]):
        with_sessions(small_model("bmshj2018-hyperprior"), folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    export_onnx(prepared(x), folder)
    return folder


def test_an_operation_without_an_onnx_form_leaves_nothing(x: Tensor, tmp_path: Path) -> None:
    model = Codec(lambda m, x: torch.erfinv(0.1 * m.conv(x)))
    gm = fmpq_fx.prepare(model, 0.25, calibration=x, bits=[8], planner="uniform")
    with pytest.raises(FmpqError, match=r"node 'erfinv' has no ONNX form here: .*call_function 'erfinv'.*"):
        export_onnx(gm, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(
    x: Tensor, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = fmpq_fx.prepare(Codec(), 0.25, calibration=x, bits=[8], planner="uniform")
    with pytest.raises(FmpqError, match=r"opset 17 is too old.* opset 21"):
        export_onnx(gm, tmp_path / "onnx", opset=17)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(FmpqError, match="is no export"):
        export_onnx(gm, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="threads is 0"):
        with_sessions(Codec(), exported, threads=0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FmpqError, match=r"pip install 'fmpq-fx\[onnx\]'"):
        with_sessions(Codec(), exported)
