"""Exported graphs compute what the torch graph computes, whatever the model; bad exports are refused."""

import copy
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import einops
import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.quant.layers import QuantizedGDN
from support.coded_models import graph_of
from support.small_models import small_model
from support.traced_models import Codec

pytest.importorskip("onnxscript", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from fmpq_fx.onnx.codec import with_sessions
from fmpq_fx.onnx.export import export_onnx
from fmpq_fx.onnx.manifest import OnnxManifest

PHOTO = fmpq_fx.samples.photos()["astronaut"][None, :, 128:256, 128:384]
AT_10_BITS = ("g_a.2", "g_s.4")


@dataclass(frozen=True)
class Exported:
    """A graph, and the folder of its export."""

    gm: fx.GraphModule
    folder: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a trained model and its export."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    gm = graph_of(fmpq_fx.samples.model(), PHOTO, bits=8, fixed=dict.fromkeys(AT_10_BITS, 10))
    export_onnx(gm, folder)
    return Exported(gm, folder)


class Attentive(nn.Module):
    """A user's codec of images with four channels: a norm, a linear layer, attention, and sizes of another part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Conv2d(4, 6, 3, 2, 1), nn.ConvTranspose2d(6, 4, 4, 2, 1)
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.prior = EntropyBottleneck(6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.down(x)
        height, width = y.shape[-2:]
        tokens = self.norm(einops.rearrange(y, "b c h w -> b (h w) c"))
        attention = (tokens.transpose(1, 2) @ tokens / (height * width)).softmax(-1)
        tokens = tokens + self.linear(tokens @ attention)
        y = einops.rearrange(tokens, "b (h w) c -> b c h w", h=height)
        y_hat, likelihoods = self.prior(20 * y)
        return {"x_hat": self.up(y_hat)[..., : 2 * height, : 2 * width], "likelihoods": {"y": likelihoods}}


def test_a_model_is_exported_if_runtimes_compute_what_it_does(tmp_path: Path) -> None:
    # The export itself compares each graph with torch's, in each runtime, on images of two sizes.
    x = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    gm = fmpq_fx.prepare(Attentive().eval(), 0.25, calibration=x, bits=[8], planner="uniform")
    manifest = export_onnx(gm, tmp_path / "onnx")
    assert "onnxruntime" in manifest.checked_with
    assert any(not sizes for part in manifest.parts for sizes in part.inputs.values())  # a number
    for part in manifest.parts:
        assert not part.unusable
        for value, sizes in (part.inputs | part.outputs).items():
            assert not sizes or [sizes[0], *sizes[2:]] == ["batch", f"{value}_height", f"{value}_width"]


def test_all_backends_read_each_others_bitstreams(exported: Exported) -> None:
    # And the image is as good; what is rounded is what was announced.
    x, manifest = PHOTO, OnnxManifest.of_folder(exported.folder)
    assert {part.name: part.module for part in manifest.parts} == {
        "analysis": "g_a",
        "hyper_analysis": "h_a",
        "hyper_synthesis": "h_s",
        "synthesis": "g_s",
    }
    torch_codec: Any = fmpq_fx.convert(exported.gm)
    codecs: list[Any] = [torch_codec]
    for backend in manifest.checked_with:
        codecs.append(with_sessions(torch_codec, exported.folder, backend=backend, threads=1))
    quality = {}
    with torch.no_grad():
        coded = {codec: codec.compress(x) for codec in codecs}
        for encoder, data in coded.items():
            for decoder in coded:
                x_hat = decoder.decompress(data["strings"], data["shape"])["x_hat"]
                quality[encoder, decoder] = -10 * (x_hat - x).square().mean().log10().item()
    # A value at a tie may be rounded either way, and all that follows sees it: hundredths of a dB on a small image.
    assert max(quality.values()) - min(quality.values()) < 0.2
    for codec in codecs[1:]:
        # A copy runs as well, and the files of one codec are the other's.
        data = fmpq_fx.encode(copy.deepcopy(codec), x[0])
        assert fmpq_fx.decode(torch_codec, data).shape == x[0].shape


def test_the_manifest_lists_what_runs_and_what_it_takes(exported: Exported) -> None:
    gm, folder = exported.gm, exported.folder
    manifest, plan = OnnxManifest.of_folder(folder), fmpq_fx.plan_of(gm)
    assert {layer.site for layer in manifest.layers if layer.bits == 10} == set(AT_10_BITS)
    for layer in manifest.layers:
        assert layer.bits == plan.bits[layer.site]
        quantized: Any = gm.get_submodule(layer.site)
        norm = isinstance(quantized, QuantizedGDN)
        assert layer.stored == ("int16" if layer.bits == 10 else "uint8" if norm else "int8")
        assert layer.runs == ("float32" if norm or layer.bits == 10 else "int8")
        assert norm or layer.bits != 10 or layer.why == "its weights have 10 bits"
    assert manifest.nominal_bytes == plan.nominal_bytes
    assert manifest.stored_bytes >= manifest.nominal_bytes
    assert "g_a.0" in str(manifest)
    assert sum(file.stat().st_size for file in folder.glob("*.onnx")) == manifest.bytes


@pytest.mark.parametrize("mistake", ["missing", "altered", "foreign", "version", "nothing", "another model"])
def test_an_export_that_is_not_whole_is_refused(mistake: str, exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported.folder, folder)
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


class ThroughNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.cbrt(x.detach().numpy()))


@pytest.mark.parametrize(
    ("operation", "node"),
    [
        (lambda x: torch.erfinv(0.1 * x).relu(), "erfinv"),  # that no ONNX operation does
        (lambda x: ThroughNumPy.apply(x), r"\w+', module '\w+"),  # that needs numbers
    ],
    ids=["no ONNX form", "no torch"],
)
def test_an_operation_without_an_onnx_form_leaves_nothing(
    operation: Any, node: str, x: Tensor, tmp_path: Path
) -> None:
    gm = graph_of(Codec(lambda m, x: operation(m.conv(x))), x, fixed={"conv": None, "last": None})
    with pytest.raises(FmpqError, match=rf"(?s)node '{node}' has no ONNX form here: .*File .*, line"):
        export_onnx(gm, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(
    x: Tensor, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, folder = exported.gm, exported.folder
    with pytest.raises(FmpqError, match=r"opset 17 is too old.* opset 21"):
        export_onnx(gm, tmp_path / "onnx", opset=17)
    with pytest.raises(ValueError, match="form is 'tpu'; pass one of 'portable', 'onnxruntime'"):
        export_onnx(gm, tmp_path / "onnx", form="tpu")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(FmpqError, match="is no export"):
        export_onnx(gm, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious.txt"]
    codec = fmpq_fx.convert(gm)
    with pytest.raises(ValueError, match="threads is 0"):
        with_sessions(codec, folder, threads=0)
    with pytest.raises(ValueError, match=r"providers are \['Abacus'\]; this ONNX Runtime has"):
        with_sessions(codec, folder, providers=["Abacus"])
    with pytest.raises(ValueError, match="precision is 'bf17'; pass one of 'f32', 'bf16'"):
        with_sessions(codec, folder, backend="openvino", precision="bf17")
    with pytest.raises(TypeError, match="providers"):
        with_sessions(codec, folder, backend="openvino", providers=["CPUExecutionProvider"])
    for name, extra in {"onnxruntime": "onnx", "openvino": "openvino"}.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(FmpqError, match=rf"pip install 'fmpq-fx\[{extra}\]'"):
            with_sessions(codec, folder, backend=name)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(FmpqError, match=r"pip install 'fmpq-fx\[onnx\]'"):
        export_onnx(gm, tmp_path / "onnx")


def test_a_part_that_a_runtime_cannot_run_is_refused_there(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported.folder, folder)
    manifest = OnnxManifest.of_folder(folder)
    first, *others = manifest.parts
    replace(manifest, parts=(replace(first, unusable={"onnxruntime": "it broke"}), *others)).save(
        folder / "manifest.json"
    )
    with pytest.raises(FmpqError, match=r"onnxruntime cannot run the analysis of .*: it broke"):
        with_sessions(fmpq_fx.convert(exported.gm), folder)
