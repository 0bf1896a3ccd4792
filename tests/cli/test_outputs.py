"""No command writes over what a user would miss: its inputs, by whatever name, and what it did not write."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import fx

import fmpq_fx
from fmpq_fx.cli.main import main, parser
from fmpq_fx.formats.state import save_state
from fmpq_fx.images import reading


@pytest.fixture(scope="module")
def made(prepared: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    fmpq_fx.save(prepared, folder / "model.fmpq")
    save_state(prepared, folder / "state", model="bmshj2018-hyperprior")
    (folder / "photos").mkdir()
    for index in range(2):
        noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index))
        image = Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy())
        image.save(folder / "photos" / f"{index}.png")
    codec = fmpq_fx.load_codec(folder / "model.fmpq")
    (folder / "0.fmi").write_bytes(fmpq_fx.encode(codec, reading.read(folder / "photos" / "0.png")))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with copies of a model, a state, coded and other images, and notes of the user."""
    for path in [*made.glob("*.fmpq"), *made.glob("*.fmi"), made / "state", *made.glob("photos/*")]:
        copy = tmp_path / path.relative_to(made)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "notes").write_text("of the user")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.fmi").write_text("of the user")
    (tmp_path / "other.png").write_bytes((tmp_path / "photos" / "1.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(of: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command of the program, with its name."""
    below = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name.strip(), of
    for action in below:
        for word, command in action.choices.items():
            yield from commands(command, f"{name} {word}")


@pytest.mark.parametrize("name", [name for name, _ in commands(parser())])
def test_a_command_says_of_each_path_whether_it_reads_or_writes_it(name: str) -> None:
    command = dict(commands(parser()))[name]
    paths = {action.dest for action in command._actions if action.type is Path}
    declared = {*command.get_default("reads"), *(dest for dest, _ in command.get_default("writes"))}
    assert paths <= declared


def test_an_input_is_not_written_over_by_any_of_its_names(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = here / "photos" / "0.png"
    (here / "link").symlink_to(photo)
    os.link(photo, here / "second.fmi")
    before = contents(here)
    for out in ("link", "second.fmi", "photos/../second.fmi"):
        assert main(["encode", "photos/0.png", "-m", "model.fmpq", "-o", out]) == 2
        assert "which is an input; name another file, or pass --overwrite" in capsys.readouterr().err
        assert contents(here) == before, out
    assert main(["encode", "photos/0.png", "-m", "model.fmpq", "-o", "second.fmi", "--overwrite"]) == 0
    assert (here / "second.fmi").read_bytes() == (here / "0.fmi").read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        "decode 0.fmi -m model.fmpq -o other.png",
        "encode photos/0.png -m model.fmpq -o mine/notes.fmi",
        "decode . -m model.fmpq -o photos",  # where 0.png is already
        "evaluate model.fmpq photos --json model.fmpq",
        "evaluate model.fmpq photos --json photos/0.png",
        "evaluate model.fmpq photos --json notes",
        "finetune state photos --out state",
        "finetune state photos --out notes",
        "finetune state photos --out tuned --history notes",
        "finetune state photos --out tuned --validation . --history other.png",
        "prepare sample --target-cr 4 --plot other.png",
        "prepare sample --target-cr 4 --plan-out notes",
        "prepare sample --target-cr 4 --sensitivity notes",
        "prepare sample --target-cr 4 --out notes",
        "prepare mbt2018 --checkpoint notes --target-cr 4 --out notes",
        "export checkpoint state --out notes",
        "export checkpoint state --out state",
    ],
)
def test_nothing_is_written_over_that_the_program_did_not_write(
    line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    assert main(line.split()) == 2
    assert "name another file, or pass --overwrite" in capsys.readouterr().err
    assert contents(here) == before


@pytest.mark.parametrize(
    "line",
    [
        "encode photos/0.png -m model.fmpq -o new.fmi",
        "encode photos -m model.fmpq -o coded",
        "decode 0.fmi -m model.fmpq -o new.png",
        "decode 0.fmi -m model.fmpq -o new.webp",
        "decode . -m model.fmpq -o decoded",
        "evaluate model.fmpq photos --json results.json",
        "export model state --out new.fmpq",
    ],
)
def test_what_the_same_command_wrote_before_makes_way(line: str, here: Path) -> None:
    assert main(line.split()) == 0
    assert main(line.split()) == 0


def test_a_checkpoint_is_not_known_to_be_ours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", "checkpoint", "state", "--out", "weights"]
    assert main(line) == 0
    assert main(line) == 2
    assert "weights is there already" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0


def test_two_results_do_not_go_into_one_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(here)
    line = "prepare sample --target-cr 4 --plan-out new.json --sensitivity ./photos/../new.json --overwrite"
    assert main(line.split()) == 2
    assert "would be written to one file" in capsys.readouterr().err
    assert contents(here) == before


def test_pictures_and_plans_of_before_make_way(
    here: Path, prepared: fx.GraphModule, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("png", "svg", "pdf"):
        fmpq_fx.plot_plan(prepared, here / f"plan.{suffix}")
    fmpq_fx.plan_of(prepared).save(here / "plan.json")
    # The files are looked at before the model, of which there is none.
    for line in [f"--plot plan.{suffix}" for suffix in ("png", "svg", "pdf")] + ["--plan-out plan.json"]:
        assert main([*["prepare", "no_such_model", "--target-cr", "4"], *line.split()]) == 2
        assert "there is no model and no file" in capsys.readouterr().err
