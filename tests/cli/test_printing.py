"""Printing never fails a job, whatever stdout is: files are written, and the exit status is that of the work."""

import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

import pytest
from PIL import Image
from torch import fx

import fmpq_fx
from fmpq_fx.cli.main import main
from fmpq_fx.cli.printing import forgiving

NAME = "\u5199\u771f.png"  # "photograph" in Japanese


def stream(kind: str) -> TextIO:
    if kind == "closed pipe":
        read, write = os.pipe()
        os.close(read)
        return os.fdopen(write, "w", encoding="utf-8")
    if kind == "full disk":
        return Path("/dev/full").open("w", encoding="utf-8")
    return io.TextIOWrapper(io.BytesIO(), encoding=kind)


@pytest.mark.parametrize("kind", ["cp1252", "ascii", "closed pipe", "full disk"])
def test_results_are_written_whatever_becomes_of_what_is_printed(
    kind: str,
    prepared: fx.GraphModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "full disk" and not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / NAME)
    model, results = tmp_path / "model.fmpq", tmp_path / "results.json"
    fmpq_fx.save(prepared, model)
    monkeypatch.setattr(sys, "stdout", stream(kind))
    assert main(["evaluate", str(model), str(tmp_path / "photos"), "--json", str(results)]) == 0
    assert json.loads(results.read_text())["images"][0]["name"] == NAME
    assert main(["inspect", str(model)]) == 0
    sys.stdout.close()  # as Python does in the end: nothing is left that could fail
    assert ("cannot print" in capsys.readouterr().err) == (kind == "full disk")


def test_characters_that_stdout_lacks_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "-m fmpq_fx ?' runs prepare" in " ".join(printed.split())


def test_files_are_written_before_anything_is_printed(
    prepared: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "0.png")
    fmpq_fx.save(prepared, tmp_path / "model.fmpq")

    class Ended(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Ended())
    arguments = ["evaluate", tmp_path / "model.fmpq", tmp_path / "photos", "--json", tmp_path / "r.json"]
    assert main(list(map(str, arguments))) == 130
    assert json.loads((tmp_path / "r.json").read_text())["images"]


def test_warnings_are_sentences() -> None:
    """Under pytest, which records warnings, only the form of one can be seen."""
    before = warnings.formatwarning
    with forgiving():
        said = warnings.formatwarning(UserWarning("image skipped"), UserWarning, "crops.py", 172)
        other = warnings.formatwarning(FutureWarning("old"), FutureWarning, "crops.py", 172)
    assert said == "fmpq-fx: warning: image skipped\n"
    assert "crops.py:172: FutureWarning: old" in other
    assert warnings.formatwarning is before
