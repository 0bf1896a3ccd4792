"""The command line as a user types it: what it prints, what it writes, and what it says of mistakes."""

import sys
from pathlib import Path

import pytest
import torch
from compressai.models import ScaleHyperprior
from PIL import Image
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import Plan, Sensitivity, plan_of
from fmpq_fx.cli.main import main
from fmpq_fx.formats.state import load_state
from fmpq_fx.models.zoo import load_model, model_names
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.quant import quantized_layers
from fmpq_fx.training.run import TrainingRun
from support.small_models import small_model

PIPELINE = sys.modules["fmpq_fx.pipeline"]


def make_model() -> nn.Module:
    """Return the model that "test_cli:make_model" names on the command line."""
    return small_model("bmshj2018-hyperprior")


def not_a_model() -> int:
    return 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(2):
        noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    return folder


def prepare(*arguments: object) -> int:
    return main(["prepare", "test_cli:make_model", *map(str, arguments)])


def test_prepare_prints_the_table_and_writes_what_was_asked_for(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, picture, table = tmp_path / "plan.json", tmp_path / "plan.png", tmp_path / "table.json"
    state = tmp_path / "state"
    files = ("--plan-out", plan, "--plot", picture, "--sensitivity", table, "--out", state)
    assert prepare("--target-cr", 4, "--images", photos, "--bits", "2-9", "--fixed", "g_s.6=8", *files) == 0
    printed = capsys.readouterr().out
    assert "g_a.0" in printed
    assert f"state: {state}" in printed
    assert plan_of(load_state(state)) == Plan.load(plan)
    loaded = Plan.load(plan)
    assert 0.24 <= loaded.cr <= 0.25
    assert loaded.bits["g_s.6"] == 8
    assert loaded.sensitivity == Sensitivity.load(table)
    assert loaded.sensitivity.bits == tuple(range(2, 10))
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_a_saved_table_is_reused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    arguments = ("--images", photos, "--bits", "4,8", "--sensitivity", table, "--activation-bits", "none")
    assert prepare("--target-cr", 0.2, *arguments) == 0
    monkeypatch.setattr(ChangeMeter, "measure_base", None)  # a second measurement would fail
    assert prepare("--target-cr", 0.2, *arguments) == 0
    assert "A32" in capsys.readouterr().out


def test_inputs_of_single_layers_get_their_bits(photos: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    widths = ("--activation-bits", "6", "--activation-bits", "g_s.6=16", "--activation-bits", "h_*=none")
    arguments = ("--images", photos, "--bits", "6", "--planner", "uniform", "--plan-out", plan)
    assert prepare("--target-cr", 0.1875, *arguments, *widths) == 0
    found = Plan.load(plan).activation_bits
    assert (found["g_a.0"], found["g_s.6"], found["h_s.0"]) == (6, 16, None)
    last = ("--activation-bits", "6", "--activation-bits", "mixed", "--activation-budget", "0")
    assert prepare("--target-cr", 0.1875, *arguments, *last) == 0
    assert set(Plan.load(plan).activation_bits.values()) == {8}, "the last word counts"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prepare", "nothing", "--target-cr", "0.25"], "there is no model and no file 'nothing'"),
        (["prepare", "mbt2018", "--target-cr", "0.25"], "pass --quality"),
        (["prepare", "elic2022-official", "--target-cr", "0.25"], "no pretrained weights"),
        (
            ["prepare", "mbt2018", "--target-cr", "0.25", "--checkpoint", "absent.pth"],
            "no checkpoint absent.pth",
        ),
        (["prepare", "sample", "--quality", "3", "--target-cr", "0.25"], "trained already"),
        (
            ["prepare", __file__, "--target-cr", "0.25"],
            "test_cli.py is in no format that is known here, no model",
        ),
        (["prepare", "test_cli:not_a_model", "--quality", "3", "--target-cr", "4"], "leave --quality out"),
        (
            [
                "prepare",
                "test_cli:not_a_model",
                *("--metric", "mse", "--distortion", "mse", "--target-cr", "4"),
            ],
            "--metric would change nothing",
        ),
        (["prepare", "no_module:f", "--target-cr", "0.25"], "cannot get a model"),
        (["prepare", "test_cli:not_a_model", "--target-cr", "0.25"], "returned a int"),
        (["prepare", "sample", "--target-cr", "0.25", "--images", "absent"], "absent"),
        (["prepare", "sample", "--target-cr", "0.25", "--plot", "plan.docx"], "png"),
        (["prepare", "sample", "--target-cr", "0.25", "--plan-out", "absent/plan.json"], "no folder absent"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChangeMeter, "measure_base", None)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fmpq-fx: error: ")
    assert says in error


@pytest.mark.parametrize(
    "option",
    [
        ["--bits", "two"],
        ["--bits", "8-4"],
        ["--activation-bits", "some"],
        ["--activation-bits", "g_s.6=some"],
        ["--fixed", "g_s.6"],
        ["--planner", "best"],
    ],
)
def test_options_that_cannot_be_read(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        prepare("--target-cr", 0.25, *option)
    assert option[0] in capsys.readouterr().err


def test_an_unreachable_target_says_what_to_pass(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--target-cr", 0.75, "--images", photos, "--bits", "2,8") == 2
    assert "for a 75 % reduction pass 0.25" in capsys.readouterr().err


def test_checkpoints_in_the_forms_that_compressai_saves(tmp_path: Path) -> None:
    model = small_model("bmshj2018-hyperprior")
    state = model.state_dict()
    forms = {
        "plain": state,
        "training": {"epoch": 1, "state_dict": state},
        "parallel": {f"module.{k}": v for k, v in state.items()},
    }
    for form, content in forms.items():
        path = tmp_path / f"{form}.pth"
        torch.save(content, path)
        loaded = load_model("bmshj2018-hyperprior", checkpoint=path)
        assert isinstance(loaded, ScaleHyperprior)
        assert torch.equal(loaded.get_parameter("g_s.6.weight"), model.get_parameter("g_s.6.weight")), form
        assert not loaded.training


def test_a_checkpoint_of_another_model_or_none_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(small_model("mbt2018").state_dict(), path)
    with pytest.raises(fmpq_fx.FmpqError, match="not of a bmshj2018-factorized"):
        load_model("bmshj2018-factorized", checkpoint=path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(fmpq_fx.FmpqError, match="not a checkpoint"):
        load_model("mbt2018", checkpoint=path)


def test_the_zoo_is_listed() -> None:
    expected = {
        "bmshj2018-factorized", "bmshj2018-factorized-relu", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018",
        "cheng2020-anchor", "cheng2020-attn", "elic2022-official", "elic2022-chandelier",
        "cheng2020-anchor-checkerboard",
    }  # fmt: skip
    assert expected <= set(model_names())
    assert not {"ssf2020", "hrtzxf2022-pcc-rec"} & set(model_names())


def test_an_interruption_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PIPELINE, "plan_lazily", interrupt)
    assert prepare("--target-cr", 0.25, "--plan-out", tmp_path / "plan.json") == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


TRAIN = ("--steps", 6, "--crop", 64, "--validate-every", 2, "--workers", 0, "--lr", "1e-3")


@pytest.fixture(scope="module")
def state(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "prepared"
    assert prepare("--target-cr", 8, "--images", photos, "--bits", "3-5", "--out", path) == 0
    return path


def run(*arguments: object) -> int:
    return main(list(map(str, arguments)))


def test_a_state_is_fine_tuned_evaluated_and_exported(
    state: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, history, exported = tmp_path / "tuned", tmp_path / "history.json", tmp_path / "model.pth.tar"
    assert run("finetune", state, photos, "--out", tuned, "--history", history, *TRAIN) == 0
    assert "kept" in capsys.readouterr().out
    assert fmpq_fx.History.load(history).settings.steps == 6
    assert not tuned.with_name("tuned.training").exists(), "the checkpoint is gone once the result is there"
    assert run("evaluate", tuned, photos) == 0
    assert "mean" in capsys.readouterr().out
    assert run("export", "checkpoint", tuned, "--out", exported) == 0
    model = load_model("bmshj2018-hyperprior", checkpoint=exported)
    quantized = quantized_layers(load_state(tuned))["g_a.0"]
    assert torch.equal(model.get_parameter("g_a.0.weight"), quantized.weight)


def test_an_interrupted_fine_tuning_goes_on_with_the_same_command(
    state: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, tuned = tmp_path / "whole", tmp_path / "tuned"
    assert run("finetune", state, photos, "--out", whole, *TRAIN) == 0
    step = TrainingRun.step

    def interrupted(self: TrainingRun, x: Tensor) -> dict[str, str]:
        if len(self.losses) == 3:
            raise KeyboardInterrupt
        return step(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "step", interrupted)
        assert run("finetune", state, photos, "--out", tuned, *TRAIN) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not tuned.exists()
    assert run("finetune", state, photos, "--out", tuned, *TRAIN) == 0
    assert tuned.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["finetune", "absent", "photos", "--out", "x"], "there is no file absent"),
        (["finetune", "STATE", "absent", "--out", "x"], "no such image folder"),
        (["finetune", "STATE", "PHOTOS", "--out", "absent/x"], "no folder absent"),
        (["finetune", "STATE", "PHOTOS", "--out", "x", "--crop", "128"], "none of the 2 images"),
        (["evaluate", "STATE", "PHOTOS", "--quality", "3"], "leave --quality, --metric and --checkpoint out"),
        (["evaluate", "STATE", "PHOTOS", "--threads", "0"], "--threads is 0; pass 1 or more"),
        (["evaluate", "STATE", "PHOTOS", "--class", "a:b"], "--class would change nothing"),
        (
            ["evaluate", "test_cli:make_model", "PHOTOS", "--metric", "ms-ssim"],
            "--metric would change nothing: it chooses among CompressAI's pretrained weights, and those of "
            "test_cli:make_model are wanted; leave it out",
        ),
        (
            ["evaluate", "mbt2018", "PHOTOS", "--checkpoint", "m.pth", "--metric", "mse"],
            "and those of m.pth are wanted; leave it out",
        ),
        (
            ["finetune", "STATE", "PHOTOS", "--out", "x", "--workers", "-1"],
            "workers must not be negative, got -1",
        ),
        (["export", "checkpoint", "STATE", "--out", "absent/x"], "no folder absent"),
    ],
)
def test_mistakes_with_states_are_named(
    arguments: list[str], says: str, state: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"STATE": str(state), "PHOTOS": str(photos)}.get(a, a) for a in arguments]
    assert main(given) == 2
    assert says in capsys.readouterr().err
