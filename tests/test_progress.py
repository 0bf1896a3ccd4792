"""Progress: lines where there is no terminal, bars where there is one, and silence on request."""

import io
import itertools
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import fx

import fmpq_fx
from fmpq_fx import ranks
from fmpq_fx.progress import reported
from support.finetuning import photos, tuned
from support.small_models import small_model

PROGRESS = sys.modules["fmpq_fx.progress"]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any work take as long as it is quiet for, from one look at the clock to the next."""
    monkeypatch.setattr(PROGRESS, "monotonic", itertools.count(0, PROGRESS.QUIET).__next__)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def lines(capsys: pytest.CaptureFixture[str], what: str) -> list[str]:
    """Return what the lines on stderr about ``what`` say first: "5 of 10 steps"."""
    printed = capsys.readouterr().err.splitlines()
    return [line.partition(": ")[2].partition(",")[0] for line in printed if line.startswith(f"{what}: ")]


@pytest.mark.usefixtures("slow")
def test_without_a_terminal_there_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(reported(range(25), "counting", "number")) == list(range(25))
    tenths = [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert lines(capsys, "counting") == [f"{done} of 25 numbers" for done in tenths]


def test_of_work_that_is_soon_over_nothing_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands at the number of what has been counted."""
    now = 0.0
    monkeypatch.setattr(PROGRESS, "monotonic", lambda: now)
    for long, told in ((4, []), (6, [5, 6]), (60, [6, 12, 18, 24, 30, 36, 42, 48, 54, 60])):
        now = 0.0
        for now in reported(range(1, long + 1), "counting", "number"):  # noqa: B007
            pass
        assert lines(capsys, "counting") == [f"{done} of {long} numbers" for done in told]


@pytest.mark.usefixtures("slow")
def test_lines_come_as_often_as_asked_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with reported(range(10), "counting", "number", done=3, every=4) as work:
        for _ in range(7):
            work.set_postfix({"sum": "1.5"})
            work.update()
    printed = capsys.readouterr().err.splitlines()
    assert [line[: line.index(",")] for line in printed] == [
        "counting: 4 of 10 numbers",
        "counting: 8 of 10 numbers",
        "counting: 10 of 10 numbers",
    ]
    assert all(line.endswith("left, sum 1.5") for line in printed)


@pytest.mark.usefixtures("slow")
def test_silence_on_request_and_for_a_single_piece(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(reported(range(20), "counting", "number", show=False)) == list(range(20))
    assert list(reported(["all"], "counting", "number")) == ["all"]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("slow")
def test_only_the_first_rank_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    for show in (None, True):
        assert list(reported(range(3), "counting", "number", show=show)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(reported(range(3), "counting", "number", leave=True)) == [0, 1, 2]
    assert "\rcounting: 100%" in terminal.getvalue()


@pytest.mark.usefixtures("slow")
def test_the_work_goes_on_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Closed())
    assert list(reported(range(3), "counting", "number")) == [0, 1, 2]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("progress", [None, False])
def test_preparing_tells_how_far_it_is(progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model, images = small_model("bmshj2018-hyperprior"), [torch.stack(photos(1, side=64))] * 2
    fmpq_fx.prepare(
        model, 0.2, calibration=images, bits=[4, 8], size="coded", planner="optimal", progress=progress
    )
    printed = capsys.readouterr().err
    for what in ("coded sizes", "sensitivity", "activation ranges"):
        assert (f"{what}: " in printed) is (progress is None), what
    fmpq_fx.prepare(model, 0.125, calibration=images, bits=[4], planner="uniform", progress=progress)
    assert ("weight scales: " in capsys.readouterr().err) is (progress is None)
    fmpq_fx.analyze(model, calibration=images, bits=[4, 8], progress=progress)
    assert ("sensitivity: " in capsys.readouterr().err) is (progress is None)


@pytest.mark.usefixtures("slow")
def test_training_prints_a_line_at_each_validation(
    gm: fx.GraphModule, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tuned(gm, steps=10, validate_every=4)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ")]
    assert len(printed) == 3
    for line, validation in zip(printed, history.validation[1:], strict=True):
        assert line.startswith(f"training: {validation.step} of 10 steps, ")
        assert line.endswith(f", validation {validation.rd_loss:.4g}")
    tuned(gm, steps=2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("slow")
def test_evaluating_a_folder_tells_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model("bmshj2018-hyperprior")
    for number in range(2):
        Image.new("RGB", (64, 64), (90, 120, 50 * number)).save(tmp_path / f"{number}.png")
    fmpq_fx.evaluate(model, tmp_path)
    assert lines(capsys, "evaluate") == ["1 of 2 images", "2 of 2 images"]
    fmpq_fx.evaluate(model, tmp_path, progress=False)
    assert capsys.readouterr().err == ""
