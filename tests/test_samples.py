"""The model and the photographs that come with the package."""

import json
import math
import runpy
import socket
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from safetensors import safe_open
from torch import Tensor

from fmpq_fx import samples
from fmpq_fx.images import crops, reading

FILE = "scale-hyperprior-n64-m96-lmbda0.0130.safetensors"


@pytest.fixture(scope="module")
def model() -> ScaleHyperprior:
    return samples.model()


@pytest.fixture(scope="module")
def crop() -> Tensor:
    (batch,) = crops.cut([samples.held_out_photos()["motorcycle"]], count=1)
    return batch


def psnr(x_hat: Tensor, x: Tensor) -> float:
    return -10 * math.log10(float((x_hat - x).square().mean()))


def test_the_model_compresses_a_photograph_it_has_not_seen(model: ScaleHyperprior, crop: Tensor) -> None:
    assert not model.training
    with torch.no_grad():
        output = model(crop)
    bits = -sum(float(p.log2().sum()) for p in output["likelihoods"].values())
    # Kodak averages 31.3 dB at 0.55 bpp with this model; this crop, full of detail, has 27.6 dB at 0.83 bpp.
    # An untrained model has 7 dB, and a model that lost one layer's weights is far outside.
    assert 27 < psnr(output["x_hat"], crop) < 28
    assert 0.75 < bits / (256 * 256) < 0.9


def test_the_model_is_ready_to_code(model: ScaleHyperprior, crop: Tensor) -> None:
    with torch.no_grad():
        coded = model.compress(crop)
        decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
        expected = model(crop)["x_hat"].clamp(0, 1)
    size = sum(len(strings[0]) for strings in coded["strings"])
    assert 0.75 < size * 8 / (256 * 256) < 0.9
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


def test_each_call_gives_a_model_of_its_own(model: ScaleHyperprior) -> None:
    changed = samples.model()
    with torch.no_grad():
        changed.g_a[0].weight.zero_()
    assert model.g_a[0].weight.abs().max() > 0
    assert samples.model().g_a[0].weight.abs().max() > 0


def test_models_are_chosen_by_lmbda() -> None:
    assert 0.013 in samples.LMBDAS
    for lmbda in samples.LMBDAS:
        assert isinstance(samples.model(lmbda), ScaleHyperprior)
    with pytest.raises(ValueError, match=r"lmbda=0\.5; there is one for .*0\.013"):
        samples.model(0.5)


def test_the_model_file_is_what_its_tool_makes(
    model: ScaleHyperprior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing the loaded model again gives the same file content: nothing is lost on either way."""
    with (
        resources.as_file(resources.files("fmpq_fx.data") / FILE) as path,
        safe_open(path, framework="pt") as stored,
    ):
        assert path.stat().st_size < 3e6, "four such files are to fit into 12 MB"
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no dict)
    about = json.loads(metadata["model"])
    assert (about["N"], about["M"], about["lmbda"]) == (64, 96, 0.013)
    assert "research use" in about["note"]

    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    tool = runpy.run_path(str(benchmarks / "pack_model.py"))
    checkpoint: dict[str, Any] = {**about, "arch": "bmshj2018-hyperprior", "state_dict": model.state_dict()}
    packed, packed_metadata = tool["pack"](checkpoint)
    assert packed_metadata == metadata
    assert packed.keys() == tensors.keys()
    for name, tensor in packed.items():
        assert tensor.dtype == tensors[name].dtype == (torch.float16 if "weight" in name else torch.float32)
        assert torch.equal(tensor, tensors[name]), name
    with pytest.raises(ValueError, match='"msh"'):
        tool["pack"]({**checkpoint, "arch": "msh"})


def test_photographs_come_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the sample photographs must not need a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photos, held_out_photos = samples.photos(), samples.held_out_photos()
    assert list(photos) == ["astronaut", "coffee", "chelsea", "rocket"]
    assert photos["coffee"].shape == (3, 400, 600)
    assert list(held_out_photos) == ["motorcycle", "hubble_deep_field", "retina", "immunohistochemistry"]
    assert held_out_photos["motorcycle"].shape == (3, 500, 741)
    for photo in (*photos.values(), *held_out_photos.values()):
        assert photo.dtype == torch.float32
        assert photo.size(0) == 3
        assert photo.min() >= 0
        assert 0.9 < photo.max() <= 1, "photographs reach nearly up to white"
        assert not torch.equal(photo[0], photo[1]), "photographs in colour"


def test_a_photograph_is_its_file_pixel_by_pixel() -> None:
    """Channels and axes are in the order that reading any image file gives."""
    import skimage.data

    path = Path(skimage.data.__file__).parent / "rocket.jpg"
    assert torch.equal(samples.photos()["rocket"], reading.read(path))
