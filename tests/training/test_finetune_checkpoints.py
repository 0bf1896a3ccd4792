"""Checkpoints of fine-tuning: an interrupted run ends like any other, and foreign files are refused and kept."""

import copy
import dataclasses
import errno
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
import torch
from torch import fx

from fmpq_fx import FmpqError, History, prepare
from fmpq_fx.history import Settings
from fmpq_fx.training.run import TrainingRun
from support.finetuning import LMBDA, photos, same_state, stopping_at, tuned
from support.small_models import small_model


class Finished(NamedTuple):
    """A run that came to its end."""

    gm: fx.GraphModule
    history: History
    checkpoint: Path


@pytest.fixture(scope="module")
def finished(prepared: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return an uninterrupted run; a test changes nothing of it."""
    gm, checkpoint = copy.deepcopy(prepared), tmp_path_factory.mktemp("finished") / "training.pt"
    return Finished(gm, tuned(gm, checkpoint=checkpoint), checkpoint)


@pytest.mark.parametrize("step", [4, 11])
def test_an_interrupted_run_goes_on_to_the_result_of_an_uninterrupted_one(
    prepared: fx.GraphModule,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    stopped, checkpoint = copy.deepcopy(prepared), tmp_path / "training.pt"
    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "step", stopping_at(step, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuned(stopped, checkpoint=checkpoint)
    assert checkpoint.exists() == (step > 4), "written at every validation"
    resumed = copy.deepcopy(prepared)  # as a new process would have it
    found = tuned(resumed, checkpoint=checkpoint)
    assert found == finished.history
    assert same_state(resumed, finished.gm)


def test_a_finished_run_is_not_done_again(
    prepared: fx.GraphModule, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingRun, "step", stopping_at(1, KeyboardInterrupt))
    again = copy.deepcopy(prepared)
    assert tuned(again, checkpoint=finished.checkpoint) == finished.history
    assert same_state(again, finished.gm)


def test_an_interruption_leaves_the_best_state_so_far(
    gm: fx.GraphModule, prepared: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = [image[:, :64, :64] for image in photos(2)]
    shorter = copy.deepcopy(prepared)
    history = tuned(shorter, validation=validation)
    assert history.best.step > 0
    monkeypatch.setattr(TrainingRun, "step", stopping_at(3, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tuned(gm, validation=validation)
    assert same_state(gm, prepared), "no validation was better than the first yet"
    assert gm.training is prepared.training


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 20}, "steps was '12' there and is '20' now"),
        ({"loss": "mse"}, "loss was 'rd'"),
        ({"lmbda": 0.02}, "lmbda was '0.01'"),
        ({"size_weight": 0.5}, "size_weight was '0.0' there and is '0.5' now"),
        ({"images": photos(7)}, "images was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    finished: Finished, change: dict[str, Any], says: str
) -> None:
    gm = copy.deepcopy(finished.gm)
    with pytest.raises(FmpqError, match=says):
        tuned(gm, checkpoint=finished.checkpoint, **change)
    assert same_state(gm, finished.gm)


def test_a_checkpoint_of_another_plan_is_refused(finished: Finished) -> None:
    other = prepare(
        small_model("bmshj2018-hyperprior"),
        0.25,
        calibration=photos(2, side=64),
        lmbda=LMBDA,
        planner="uniform",
    )
    with pytest.raises(FmpqError, match=r"another run: model was 'plan .*remove the file"):
        tuned(other, checkpoint=finished.checkpoint)


def test_a_checkpoint_of_other_weights_is_refused_and_one_of_the_state_it_left_goes_on(
    prepared: fx.GraphModule, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, gm = tmp_path / "training.pt", copy.deepcopy(prepared)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "step", stopping_at(6, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuned(gm, checkpoint=checkpoint)
    assert not same_state(gm, prepared), "step 4 was better than the start"
    assert tuned(gm, checkpoint=checkpoint) == finished.history, "the cell of a notebook, run again"
    assert same_state(gm, finished.gm)
    other = copy.deepcopy(prepared)
    with torch.no_grad():
        other.get_parameter("g_s.6.layer.weight").mul_(1.01)
    before = copy.deepcopy(other)
    with pytest.raises(FmpqError, match=r"of a model with other weights; remove the file"):
        tuned(other, checkpoint=checkpoint)
    frozen = copy.deepcopy(prepared)
    frozen.get_parameter("g_a.0.layer.weight").requires_grad_(False)
    with pytest.raises(FmpqError, match="other parameters were trained"):
        tuned(frozen, checkpoint=checkpoint)
    assert same_state(other, before)
    assert same_state(frozen, prepared), "an error changes nothing"


def test_what_is_no_checkpoint_is_refused_and_stays(gm: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("important")
    with pytest.raises(FmpqError, match=r"notes\.txt is no checkpoint of training"):
        tuned(gm, checkpoint=path)
    assert path.read_text() == "important"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(FmpqError, match="no checkpoint of this version"):
        tuned(gm, checkpoint=path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        tuned(gm, checkpoint=tmp_path / "absent" / "training.pt")


def test_a_full_disk_leaves_the_old_checkpoint_intact(
    gm: fx.GraphModule,
    prepared: fx.GraphModule,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "training.pt"
    save = torch.save
    saved = []

    def full(content: Any, file: BinaryIO) -> None:
        saved.append(content)
        if len(saved) == 2:
            file.write(b"the first half of")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            tuned(gm, checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["training.pt"]
    resumed = copy.deepcopy(prepared)
    assert tuned(resumed, checkpoint=checkpoint) == finished.history
    assert same_state(resumed, finished.gm)


def test_settings_of_a_checkpoint_cover_all_of_them(finished: Finished) -> None:
    about = torch.load(finished.checkpoint, weights_only=True)["about"]
    assert {field.name for field in dataclasses.fields(Settings)} <= about.keys()
