"""The benchmarks' own parts: points that are kept and taken up again, Bjøntegaard deltas, training, end to end."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmpq_fx import History
from fmpq_fx.coding.evaluation import Evaluation, ImageResult
from fmpq_fx.images import reading
from fmpq_fx.models.zoo import load_model
from support.small_models import images, small_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bd_rate
import end_to_end
import rd_bench
import rd_points
import rd_table
import sides
import train_models
from rd_points import Point, Results, Variant

ABOUT = {"model": "some model"}


def point(variant: Variant, rate: float = 1.0, lmbda: float = 0.01) -> Point:
    return Point(variant, lmbda, 8.0, 0.5 * rate * (lmbda / 0.01), 0.5, 30 + 100 * lmbda, 0.9, 1.0, 0)


def test_a_point_is_the_mean_of_its_images() -> None:
    images = [ImageResult(str(i), 8, 8, bpp, bpp, psnr, None, 0.0, 0.0, 0) for i, (bpp, psnr) in
              enumerate([(0.2, 30.0), (0.6, 40.0)])]  # fmt: skip
    found = Point.of(Variant(), 0.01, 32, 0.25, 32, Evaluation(tuple(images)))
    assert (found.bpp, found.psnr) == (pytest.approx(0.4), 35)
    mse = [255**2 / 1000, 255**2 / 10000]  # PSNR is a logarithm, the RD loss is not
    assert found.rd_loss == pytest.approx((0.2 + 0.01 * mse[0] + 0.6 + 0.01 * mse[1]) / 2)


def test_points_are_kept_and_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = Results(path, ABOUT)
    points = [
        point(Variant()),
        point(Variant("adaptive", 0.25, 8, 150)),
        point(Variant("adaptive", 0.25, None)),
    ]
    for each in points:
        results.add(each)
        assert list(Results(path, ABOUT).points.values()) == points[: points.index(each) + 1]
    with pytest.raises(SystemExit, match="another model"):
        Results(path, {"model": "another model"})


def test_deltas_are_zero_for_the_same_curve_and_the_excess_for_one_of_more_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = []
    for lmbda in (0.005, 0.01, 0.02, 0.03):
        here = {v: point(v, rate, lmbda) for v, rate in
                [(Variant(), 1.0), (Variant(steps=9), 1.0), (Variant("adaptive", 0.25, 8), 1.1)]}  # fmt: skip
        everything.append(here)
    rd_table.print_table(everything, 9)
    printed = capsys.readouterr().out.splitlines()
    assert [line.count("+0.00 %") for line in printed if line.startswith("float ")] == [2, 2]
    (row,) = [line for line in printed if line.startswith("adaptive")]
    assert "+10.00 %" in row
    rates, psnrs = rd_points.curve(reversed([here[Variant()] for here in everything]))
    assert rates == sorted(rates)
    assert psnrs == sorted(psnrs)


def test_a_curve_whose_quality_does_not_rise_has_no_delta(capsys: pytest.CaptureFixture[str]) -> None:
    coarse = Variant("uniform", 0.125)
    everything = [
        {v: point(v, 1.0, lmbda) for v in (Variant(), Variant(steps=9), coarse)}
        for lmbda in (0.005, 0.01, 0.02, 0.03)
    ]
    last = everything[-1][coarse]
    everything[-1][coarse] = replace(last, psnr=everything[0][coarse].psnr)
    rd_table.print_table(everything, 9)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("uniform")]
    assert row.count("not rising") == 3


def test_curves_are_drawn(tmp_path: Path) -> None:
    plan = "adaptive", 0.25
    variants = [Variant(), Variant(steps=9), Variant(*plan), Variant(*plan, steps=9)]
    everything = [{v: point(v, 1.1, lmbda) for v in variants} for lmbda in (0.005, 0.01, 0.02, 0.03)]
    rd_table.plot_curves(everything, 9, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 300


def test_points_of_another_loss_are_not_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    by_mse = Variant("adaptive", 0.25, 8, 9, "mse")
    here = {v: point(v) for v in (Variant(), Variant(steps=9), replace(by_mse, loss="rd"), by_mse)}
    rd_table.print_losses([here], 9)
    assert capsys.readouterr().out.count("adaptive") == 1


@pytest.mark.parametrize("arch", ["bmshj2018-hyperprior", "cheng2020-anchor"])
def test_a_model_is_trained_and_its_checkpoint_loads(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))
        pixels = (255 * noise).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(photos / f"{index}.png")
    given = ["-N", "8", "-M", "8", "--lmbda", "0.01", "--steps", "4", "--crop", "64", "--batch-size", "2"]
    given += ["--validate-every", "2", "--quantile-steps", "2", "--workers", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_models.py", str(photos), "--arch", arch, *given])
    train_models.main()
    path = tmp_path / f"{arch}-n8-m8-lmbda0.0100.pth"
    model = load_model(arch, checkpoint=path)
    assert model.get_buffer("entropy_bottleneck._quantized_cdf").numel() > 0, "ready to code"
    assert History.load(path.with_suffix(".json")).settings.steps == 4
    assert not list(tmp_path.glob("*.training"))


class Ruled(sides.Pillow):
    """Takes a byte more for each step of the quality, of 8 x 8 pixels."""

    def encode(self, pixels: sides.Pixels) -> bytes:
        return bytes(self.options["quality"])

    def at(self, quality: int) -> sides.Pillow:
        return Ruled(self.name, self.form, quality=quality)


@pytest.mark.parametrize(
    ("bpp", "quality"), [(0, 0), (2.5, 20), (2.54, 20), (2.57, 21), (12.5, 100), (99, 100)]
)
def test_other_formats_get_the_quality_of_the_closest_rate(bpp: float, quality: int) -> None:
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
    assert end_to_end.closest(Ruled("ruled", "PNG"), bpp, pictures).options["quality"] == quality


def test_codecs_are_measured_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, photo in enumerate(images()):
        reading.write(photo[:, 8 * index :], tmp_path / f"{index}.png")
    checkpoint = tmp_path / "model.pth"
    torch.save(small_model("bmshj2018-hyperprior").state_dict(), checkpoint)
    given = ["--images", str(tmp_path), "--checkpoint", str(checkpoint), "--calibration", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *given, "--backend", "torch", "--rounds", "2"])
    end_to_end.main()
    printed = capsys.readouterr().out
    assert "images: 1 of 64 x 64, 1 of 64 x 56; 2 rounds" in printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    ours, theirs = rows["ours, torch"], rows["float, CompressAI"]
    assert ours.count("s") == theirs.count("s") == 5, "load, encode and decode, per image and per megapixel"
    pictures = [np.asarray(Image.open(tmp_path / "0.png"))]
    (row,) = end_to_end.measure([sides.Pillow("PNG", "PNG")], pictures, rounds=1)
    assert (row.psnr, row.load) == (math.inf, None)


def test_pretrained_models_are_compared_by_their_own_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretrained(spec: str, quality: int, metric: str) -> torch.nn.Module:
        assert (spec, metric) == ("bmshj2018-hyperprior", "ms-ssim")
        asked.append(quality)
        return small_model(spec)

    asked: list[int] = []
    monkeypatch.setattr(rd_bench, "load_model", pretrained)
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        noise = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(index))
        picture = Image.fromarray((255 * noise).byte().permute(1, 2, 0).numpy())
        picture.resize((192, 192), Image.Resampling.BICUBIC).save(photos / f"{index}.png")
    given = ["--model", "bmshj2018-hyperprior", "--qualities", "2", "--metric", "ms-ssim", "--steps", "1"]
    for folder in ("calibration", "train", "images"):
        given += [f"--{folder}", str(photos)]
    given += ["--planners", "uniform", "--target-cr", "0.25", "--activation-bits", "0"]
    given += ["--out", str(tmp_path), "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bd_rate.py", *given])
    bd_rate.main()
    assert set(asked) == {2}
    assert "lambda 4.58" in capsys.readouterr().out, "that of quality 2"
    (results,) = tmp_path.glob("bd_rate-*ms-ssim-4.5800.json")
    points = Results(results, json.loads(results.read_text())["about"]).points
    assert len(points) == 4, "float and uniform, before and after fine-tuning"
    for one in points.values():
        assert one.quality == pytest.approx(-10 * math.log10(1 - one.ms_ssim))
        assert one.rd_loss == pytest.approx(one.bpp + 4.58 * (1 - one.ms_ssim), rel=1e-3)
    monkeypatch.setattr(sys, "argv", ["bd_rate.py", *given, "--qualities", "0"])
    with pytest.raises(SystemExit):
        bd_rate.main()
