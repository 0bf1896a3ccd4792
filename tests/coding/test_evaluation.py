"""evaluate() against the same figures computed by hand from the coder's strings."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from PIL import Image
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.cli.main import main
from support.coded_models import graph_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a large image and a small one of odd sides."""
    folder = tmp_path / "images"
    folder.mkdir()
    astronaut = fmpq_fx.samples.photos()["astronaut"]
    for name, part in (("a.png", astronaut[:, :192, :256]), ("b.png", astronaut[:, 100:150, 100:171])):
        Image.fromarray((part * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / name)
    return folder


def test_bytes_on_the_wire_and_the_decoded_image_by_hand(folder: Path) -> None:
    model = fmpq_fx.samples.model()
    first, second = fmpq_fx.evaluate(model, folder, robust=None).images
    assert (first.name, first.width, first.height) == ("a.png", 256, 192)

    x = fmpq_fx.samples.photos()["astronaut"][:, :192, :256].unsqueeze(0)  # multiples of 64: no padding
    with torch.no_grad():
        coded = model.compress(x)
        x_hat = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert first.bpp == sum(len(strings[0]) for strings in coded["strings"]) * 8 / (192 * 256)
    error = (x_hat * 255).round() - (x * 255).round()
    assert first.psnr == pytest.approx(
        20 * math.log10(255) - 10 * math.log10(error.square().mean()), abs=1e-4
    )
    assert first.estimated_bpp == pytest.approx(first.bpp, rel=0.03)  # 0.03: 6 kB have some overhead
    assert first.deviation == 0
    assert first.ms_ssim is not None
    assert 0.9 < first.ms_ssim < 1

    # Padded to 128 x 64 for coding; its rate is per pixel of the image that was given.
    assert (second.width, second.height, second.ms_ssim) == (71, 50, None)
    assert second.psnr > 20


def test_means_table_and_json(folder: Path) -> None:
    results = fmpq_fx.evaluate(fmpq_fx.samples.model(), folder)
    assert results.bpp == pytest.approx(sum(image.bpp for image in results.images) / 2)
    assert results.ms_ssim == results.images[0].ms_ssim  # the other is too small for it
    fields = json.loads(results.to_json())
    assert fields["mean"]["psnr"] == results.psnr
    assert [image["name"] for image in fields["images"]] == ["a.png", "b.png"]
    assert fields["images"][1]["ms_ssim"] is None
    assert f"{results.bpp:.4f}" in str(results).splitlines()[-1]


def test_a_rewritten_graph_is_coded_with_its_quantized_weights(model: nn.Module, x: Tensor) -> None:
    gm = graph_of(model, x, bits=3)
    images = {"first": x[0]}
    quantized, original = (fmpq_fx.evaluate(each, images, robust=None) for each in (gm, model))
    assert quantized.psnr != original.psnr
    codec: Any = fmpq_fx.convert(gm)
    with torch.no_grad():
        strings = codec.compress(x[:1])["strings"]
    assert quantized.bpp == 8 * sum(len(s[0]) for s in strings) / 64**2


def test_what_is_measured_is_what_a_file_holds() -> None:
    codec, photo = fmpq_fx.samples.model(), fmpq_fx.samples.photos()["astronaut"]
    images = {f"{at}": photo[:, at : at + 64, :64] for at in range(0, 256, 64)}
    container = 64  # bytes, beside what is measured
    for result in fmpq_fx.evaluate(codec, images).images:
        assert round(result.bpp * 64**2 / 8) == len(fmpq_fx.encode(codec, images[result.name])) - container


def test_the_model_is_not_touched(x: Tensor) -> None:
    model = ScaleHyperprior(8, 12).train()  # without tables: update() was never called
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fmpq_fx.evaluate(model, {"first": x[0]})
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_unreadable_image_is_named_and_left_out(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"skipped.*broken\.png"):
        results = fmpq_fx.evaluate(fmpq_fx.samples.model(), folder)
    assert len(results.images) == 2


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FmpqError, match="none of the images"):
        fmpq_fx.evaluate(fmpq_fx.samples.model(), tmp_path)


def test_a_model_that_cannot_code(x: Tensor) -> None:
    with pytest.raises(FmpqError, match=r"Conv2d has no compress\(\) and decompress\(\)"):
        fmpq_fx.evaluate(nn.Conv2d(3, 3, 1), {"first": x[0]})
    with pytest.raises(
        FmpqError, match=r"str has no compress\(\) and decompress\(\).*load_codec\(\) returned"
    ):
        fmpq_fx.evaluate("model.fmpq", {"first": x[0]})  # type: ignore[arg-type]


def test_tensors_that_are_no_images() -> None:
    with pytest.raises(ValueError, match=r"'batch' is \(1, 3, 64, 64\)"):
        fmpq_fx.evaluate(fmpq_fx.samples.model(), {"batch": torch.rand(1, 3, 64, 64)})


def test_images_without_names() -> None:
    with pytest.raises(TypeError, match="images are a list; pass a folder, or a dict of names"):
        fmpq_fx.evaluate(fmpq_fx.samples.model(), [torch.rand(3, 64, 64)])  # type: ignore[arg-type]


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "sample", str(folder), "--json", str(tmp_path / "results.json")]) == 0
    assert "a.png" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())["images"]) == 2
    assert main(["evaluate", "sample", str(folder), "--json", str(tmp_path / "absent" / "f.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
