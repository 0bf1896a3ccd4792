"""The way back: the model's own class, quantized, that codes; and a checkpoint that a stock CompressAI evaluates."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    FactorizedPrior,
)
from compressai.utils.eval_model import __main__ as eval_model
from PIL import Image
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.quant import quantized_layers
from support.coded_models import elic
from support.small_models import small_model
from support.traced_models import assert_same, outputs
from support.traced_models import photos as noise
from support.trained_graphs import Own, trained

MODELS: dict[str, Any] = {
    "bmshj2018-factorized": lambda: FactorizedPrior(8, 12),
    "bmshj2018-hyperprior": lambda: small_model("bmshj2018-hyperprior"),
    "mbt2018-mean": lambda: small_model("mbt2018-mean"),
    "mbt2018": lambda: small_model("mbt2018"),
    "cheng2020-anchor": lambda: Cheng2020Anchor(8),
    "cheng2020-anchor-checkerboard": lambda: Cheng2020AnchorCheckerboard(8),
    "elic2022-official": elic,
}


@functools.cache
def _prepared(name: str, activation_bits: int | None) -> Any:
    torch.manual_seed(0)
    return trained(MODELS[name]().eval(), activation_bits)


def prepared(name: str, activation_bits: int | None = 8) -> Any:
    """Return a graph of its own."""
    return copy.deepcopy(_prepared(name, activation_bits))


@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_computes_what_the_graph_does(name: str, x: Tensor) -> None:
    gm = prepared(name)
    codec = fmpq_fx.convert(
        gm, exact=False
    )  # what rounding to fixed point does is seen in test_integerize.py
    assert isinstance(codec, type(MODELS[name]()))
    with torch.no_grad():
        assert torch.equal(codec(x)["x_hat"], gm(x)["x_hat"])
        for key, likelihoods in gm(x)["likelihoods"].items():
            assert torch.equal(codec(x)["likelihoods"][key], likelihoods)


@pytest.mark.parametrize("name", MODELS)
def test_it_codes_and_decodes(name: str, x: Tensor) -> None:
    codec: Any = fmpq_fx.convert(prepared(name))
    with torch.no_grad():
        coded = codec.compress(x)
        decoded = codec.decompress(coded["strings"], coded["shape"])
        forward = codec(x)["x_hat"].clamp(0, 1)
    assert decoded["x_hat"].shape == x.shape
    if name in ("bmshj2018-factorized", "bmshj2018-hyperprior"):
        # The others quantize latents about means, which forward and coding add in another order.
        torch.testing.assert_close(decoded["x_hat"], forward, rtol=0, atol=1e-5)


def test_the_coding_loops_of_autoregressive_models_use_the_quantized_context_weight(x: Tensor) -> None:
    gm = prepared("mbt2018")
    codec: Any = fmpq_fx.convert(gm, exact=False)
    used = codec.context_prediction.weight * codec.context_prediction.mask
    layer = quantized_layers(gm)["context_prediction"]
    integers = layer.weight_quantizer.integers(layer.float_weight())
    assert torch.equal(used, integers * layer.weight_quantizer.scale)


def test_training_the_graph_reaches_what_is_converted_next_and_not_what_was(x: Tensor) -> None:
    gm = prepared("bmshj2018-hyperprior")
    before = fmpq_fx.convert(gm, exact=False)
    with torch.no_grad():
        expected = gm(x)["x_hat"]
        for parameter in gm.parameters():
            parameter.mul_(1.05)
        assert torch.equal(before(x)["x_hat"], expected)
        after = fmpq_fx.convert(gm, exact=False)
        assert not torch.equal(gm(x)["x_hat"], expected)
        assert torch.equal(after(x)["x_hat"], gm(x)["x_hat"])


def test_a_graph_that_was_saved_converts_as_well(x: Tensor, tmp_path: Path) -> None:
    gm = prepared("mbt2018-mean")
    torch.save(gm, tmp_path / "gm.pt")
    loaded = torch.load(tmp_path / "gm.pt", weights_only=False)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1.05)
        assert torch.equal(fmpq_fx.convert(loaded, exact=False)(x)["x_hat"], loaded(x)["x_hat"])


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018-mean", "mbt2018", "cheng2020-anchor"])
def test_a_checkpoint_loads_into_the_float_class(name: str, x: Tensor, tmp_path: Path) -> None:
    gm = prepared(name, activation_bits=None)
    fmpq_fx.export_checkpoint(gm, tmp_path / "model.pth.tar")
    state = torch.load(tmp_path / "model.pth.tar", weights_only=True)["state_dict"]
    stock = type(MODELS[name]()).from_state_dict(state).eval()
    assert not quantized_layers(stock)
    with torch.no_grad():
        # Not bit for bit: GDN's gamma went through a square root and back.
        torch.testing.assert_close(stock(x)["x_hat"], gm(x)["x_hat"], rtol=1e-3, atol=1e-3)
    weight = stock.get_parameter("g_a.0.weight" if name != "cheng2020-anchor" else "g_a.0.conv1.weight")
    site = "g_a.0" if name != "cheng2020-anchor" else "g_a.0.conv1"
    assert torch.equal(weight, quantized_layers(gm)[site].weight)


def test_compressais_own_program_evaluates_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The numbers of a stock CompressAI, which never heard of us, on the trained model and a photograph.
    photo = fmpq_fx.samples.photos()["chelsea"][:, :192, :192]
    (tmp_path / "images").mkdir()
    pixels = (photo * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "images" / "chelsea.png")
    x = photo.unsqueeze(0)
    gm = fmpq_fx.prepare(
        fmpq_fx.samples.model(), 0.25, calibration=x, bits=[8], planner="uniform", activation_bits=None
    )
    fmpq_fx.export_checkpoint(gm, tmp_path / "model.pth.tar")
    monkeypatch.chdir(tmp_path)
    eval_model.main(
        ["checkpoint", "images", "-a", "bmshj2018-hyperprior", "-p", "model.pth.tar", "-d", "out"]
    )
    (written,) = (tmp_path / "out").glob("*.json")
    results = json.loads(written.read_text())["results"]

    ours = fmpq_fx.evaluate(gm, tmp_path / "images")
    assert results["bpp"] == [pytest.approx(ours.bpp, rel=1e-3)]
    assert results["psnr-rgb"] == [pytest.approx(ours.psnr, abs=0.01)]
    assert results["ms-ssim-rgb"] == [pytest.approx(ours.ms_ssim, abs=1e-4)]


def test_without_a_plan_there_is_nothing_to_convert(tmp_path: Path) -> None:
    plain = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1)))
    for action in (fmpq_fx.convert, lambda gm: fmpq_fx.export_checkpoint(gm, tmp_path / "model.pth.tar")):
        with pytest.raises(FmpqError, match="carries no plan"):
            action(plain)
    assert not list(tmp_path.iterdir())


def test_a_layer_under_two_names_is_in_the_checkpoint_under_both(tmp_path: Path) -> None:
    gm = trained(Own().eval(), None)
    fmpq_fx.export_checkpoint(gm, tmp_path / "model.pth.tar")
    fresh = Own().eval()
    fresh.load_state_dict(torch.load(tmp_path / "model.pth.tar", weights_only=True)["state_dict"])
    assert_same(outputs(fresh, noise()), outputs(gm, noise()))
