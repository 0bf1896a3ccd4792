"""The program itself: how it is started, and what it says of itself."""

import runpy
import sys
from importlib.metadata import version

import pytest

from fmpq_fx.cli.main import main


def test_python_m_is_the_same_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fmpq_fx", "prepare", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("fmpq_fx", run_name="__main__")
    assert "--target-cr" in capsys.readouterr().out


def test_versions_are_told_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    names = ("fmpq-fx", "torch", "compressai")
    assert capsys.readouterr().out == ", ".join(f"{name} {version(name)}" for name in names) + "\n"
