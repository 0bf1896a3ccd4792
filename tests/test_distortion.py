"""A model that was trained for another distortion: measured, planned, recorded and trained with that one."""

import json
from pathlib import Path

import pytest
import torch
from compressai.losses import RateDistortionLoss
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, Plan, Sensitivity
from fmpq_fx.cli.main import main
from fmpq_fx.formats.state import load_state, save_state
from fmpq_fx.images import reading
from fmpq_fx.models import zoo
from fmpq_fx.passes.annotation import graph_note
from support.finetuning import photos, tuned
from support.small_models import small_model

LMBDA = 16.64
IMAGES = photos(2, side=192)


def by_compressai(model: nn.Module, metric: str, lmbda: float) -> float:
    """Return the RD loss on the images, as CompressAI computes it."""
    x = torch.stack(IMAGES)
    with torch.no_grad():
        loss: float = RateDistortionLoss(lmbda, metric)(model.eval()(x), x)["loss"].item()
    return loss


def mean_difference(x_hat: Tensor, x: Tensor) -> Tensor:
    return 100 * (x_hat - x).abs().mean()


@pytest.fixture(scope="module")
def table() -> Sensitivity:
    model = small_model("bmshj2018-hyperprior")
    return fmpq_fx.analyze(model, calibration=IMAGES, bits=[3, 8], lmbda=LMBDA, distortion="ms-ssim")


def test_sensitivity_and_plan_are_of_the_rd_loss_with_ms_ssim(table: Sensitivity) -> None:
    model = small_model("bmshj2018-hyperprior")
    assert table.metric == "ms-ssim"
    assert table.float_rd == pytest.approx(by_compressai(model, "ms-ssim", LMBDA), rel=1e-5)
    gm = fmpq_fx.prepare(model, 0.2, calibration=IMAGES, sensitivity=table)
    plan = fmpq_fx.plan_of(gm)
    assert plan.metric == "ms-ssim"
    assert plan.measured is not None
    assert plan.measured.rd == pytest.approx(by_compressai(gm, "ms-ssim", LMBDA), rel=1e-5)
    assert "distortion    ms-ssim" in fmpq_fx.bit_table(gm)


def test_zeta_is_that_of_the_naive_loop(table: Sensitivity) -> None:
    model = small_model("bmshj2018-hyperprior")
    base = by_compressai(model, "ms-ssim", LMBDA)
    weight = model.get_parameter("g_s.6.weight")  # transposed: output channels are dimension 1
    step = weight.detach().abs().amax((0, 2, 3), keepdim=True) / 3
    with torch.no_grad():
        weight.copy_((weight / step).round() * step)
    expected = by_compressai(model, "ms-ssim", LMBDA) / base - 1
    assert table.raw["g_s.6"][3] == pytest.approx(expected, abs=2e-6)


def test_balanced_lambda_is_of_the_distortion() -> None:
    model = small_model("bmshj2018-hyperprior")
    for given in ("ms-ssim", mean_difference):
        table = fmpq_fx.analyze(model, calibration=IMAGES, bits=[8], distortion=given)
        assert table.float_rate == pytest.approx(table.float_distortion)
    assert table.metric.endswith(":mean_difference")


def test_a_table_of_another_distortion_is_refused(table: Sensitivity) -> None:
    model = small_model("bmshj2018-hyperprior")
    with pytest.raises(ValueError, match="measured with the distortion ms-ssim, and mse was asked for"):
        fmpq_fx.prepare(model, 0.2, calibration=IMAGES, sensitivity=table, distortion="mse")
    small = [image[:, :128, :128] for image in IMAGES]
    with pytest.raises(FmpqError, match="at least 161 x 161, got 128 x 128"):
        fmpq_fx.prepare(model, 0.2, calibration=small, distortion="ms-ssim")


def test_what_was_written_before_is_of_mse(table: Sensitivity) -> None:
    fields = json.loads(table.to_json())
    assert fields.pop("metric") == "ms-ssim"
    assert Sensitivity.from_json(json.dumps(fields)).metric == "mse"
    assert Sensitivity.from_json(table.to_json()) == table


def test_training_lowers_the_rd_loss_with_the_distortion_of_the_plan(
    table: Sensitivity, tmp_path: Path
) -> None:
    model = small_model("bmshj2018-hyperprior")
    gm = fmpq_fx.prepare(model, 0.15, calibration=IMAGES, sensitivity=table, planner="uniform")
    save_state(gm, tmp_path / "state", model=f"{__name__}:state_model")
    gm = load_state(tmp_path / "state")
    assert fmpq_fx.plan_of(gm).metric == "ms-ssim"
    before = by_compressai(gm, "ms-ssim", LMBDA)
    history = tuned(gm, images=photos(4, side=192), validation=IMAGES, crop=192, batch_size=2)
    assert history.settings.distortion == "ms-ssim"
    assert "distortion: ms-ssim" in str(history)
    assert history.validation[0].rd_loss == pytest.approx(before, rel=1e-4)
    assert history.best.rd_loss == pytest.approx(by_compressai(gm, "ms-ssim", LMBDA), rel=1e-4)
    assert history.best.rd_loss < history.validation[0].rd_loss
    assert Plan.from_json(fmpq_fx.plan_of(gm).to_json()).metric == "ms-ssim"


def state_model() -> nn.Module:
    return small_model("bmshj2018-hyperprior")


def test_training_for_another_distortion_than_the_plans(gm: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match=r"of the plan weighs the distortion mse; pass lmbda= for ms-ssim"):
        tuned(gm, distortion="ms-ssim")
    with pytest.raises(ValueError, match=r"loss='mse' lowers MSE alone, and the distortion is ms-ssim"):
        tuned(gm, distortion="ms-ssim", lmbda=10.0, loss="mse")
    with pytest.raises(FmpqError, match="at least 161 x 161, got 64 x 64"):
        tuned(gm, distortion="ms-ssim", lmbda=10.0)
    history = tuned(gm, distortion=mean_difference, lmbda=2.0, lr=1e-4)
    assert history.settings.distortion.endswith(":mean_difference")
    assert history.best.rd_loss < history.validation[0].rd_loss


@pytest.mark.parametrize("distortion", ["ms-ssim", f"{__name__}:mean_difference"])
def test_the_command_line_takes_a_distortion(tmp_path: Path, distortion: str) -> None:
    for number, image in enumerate(photos(2, side=192)):
        reading.write(image, tmp_path / f"{number}.png")
    state, tuned_state = tmp_path / "state", tmp_path / "tuned"
    chosen = ["--distortion", distortion, "--bits", "8", "--planner", "uniform", "--activation-bits", "none"]
    prepare = ["prepare", f"{__name__}:state_model", "--target-cr", "4", "--images", str(tmp_path), *chosen]
    assert main([*prepare, "--out", str(state)]) == 0
    assert fmpq_fx.plan_of(load_state(state)).metric == distortion
    finetune = ["finetune", str(state), str(tmp_path), "--out", str(tuned_state), "--steps", "1"]
    again = ["--distortion", distortion] if ":" in distortion else []
    assert main([*finetune, "--batch-size", "1", "--workers", "0", *again]) == 0
    history = graph_note(load_state(tuned_state)).history
    assert history is not None
    assert history.settings.distortion == distortion


def test_pretrained_weights_are_those_of_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretrained(**options: object) -> nn.Module:
        asked.append(options)
        return small_model("bmshj2018-hyperprior")

    monkeypatch.setitem(zoo.image_models, "bmshj2018-hyperprior", pretrained)
    zoo.load_model("bmshj2018-hyperprior", quality=3, metric="ms-ssim")
    zoo.load_model("bmshj2018-hyperprior", quality=3)
    assert [options["metric"] for options in asked] == ["ms-ssim", "mse"]
