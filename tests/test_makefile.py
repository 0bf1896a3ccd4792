"""``make`` finds a Python that everything is compiled for, wherever it is, or says in one sentence what to install."""

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from support import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``make python`` on a machine whose programs are those in ``home``/bin."""
    return subprocess.run(
        ["make", "--silent", "python", *arguments],
        cwd=REPOSITORY,
        env={"PATH": str(home / "bin"), "HOME": str(home)},
        executable=shutil.which("make"),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the folder of a machine whose ``python3`` is too new: it fails whatever it is asked."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "python3", "exit 1")
    return tmp_path


def program(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_the_python_of_the_system_is_taken_where_it_suits(home: Path) -> None:
    program(home / "bin" / "python3", f'exec "{sys.executable}" "$@"')
    assert make(home).stdout == "python3\n"


@pytest.mark.parametrize("place", ["bin/python3.11", ".pyenv/versions/3.12.4/bin/python", "uv"])
def test_another_python_is_found_where_people_have_it(home: Path, place: str) -> None:
    found = home / ("with space/python" if place == "uv" else place)
    program(found, f'exec "{sys.executable}" "$@"')
    program(home / "bin" / "uv", f'echo "{found if place == "uv" else home}"')
    assert make(home).stdout == f"{'python3.11' if place == 'bin/python3.11' else found}\n"


def test_without_one_a_sentence_says_what_to_install(home: Path) -> None:
    for arguments in ((), ("PYTHON=python3",)):
        result = make(home, *arguments)
        assert result.returncode != 0
        first, *others = result.stderr.splitlines()
        assert first.startswith(
            "Python 3.10, 3.11 or 3.12 with its venv module is needed, and was not found: "
        )
        assert all(line.startswith("make: ") for line in others)


def test_the_metadata_of_the_package_name_the_same_versions() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    assert config["options"]["python_requires"] == ">=3.10, <3.13"
    assert "Python :: 3.12" in config["metadata"]["classifiers"]
    assert "Python :: 3.13" not in config["metadata"]["classifiers"]
