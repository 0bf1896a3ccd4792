"""What the README and docs/ name is there: functions, files, links, commands and their options."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import fmpq_fx
from fmpq_fx.cli.main import main
from support import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SCRIPTS = sorted(path for folder in ("examples", "benchmarks") for path in (REPOSITORY / folder).glob("*.py"))


def named(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_of_the_package_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)
    for dotted in set(re.findall(r"\bfmpq_fx((?:\.\w+)+)(?=\()", page.read_text())):
        found = fmpq_fx
        for name in dotted.strip(".").split("."):
            found = getattr(found, name)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:fmpq_fx|passes|examples|benchmarks|docs|tests)/[\w/.-]*)`", text):
        assert (REPOSITORY / path).exists(), f"{page.name} names {path}"
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert heading in slugs, f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_their_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (?:torchrun .* -m fmpq_fx|fmpq-fx) (.*)$", text, re.M):
        words = shlex.split(line, comments=True)
        command = words[:2] if words[0] == "export" else words[:1]
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        known = capsys.readouterr().out
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}\b", known), (
                f"{' '.join(command)} has no {option}"
            )
    sources = "".join(script.read_text() for script in SCRIPTS)  # they share arguments with each other
    for options in re.findall(r"^    python (?:benchmarks|examples)/\w+\.py(.*)$", text, re.M):
        for option in (word for word in shlex.split(options) if word.startswith("--")):
            assert f'"{option}"' in sources, f"no script has {option}"


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_imports_of_examples_and_benchmarks_work(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fmpq_fx"):
            module = __import__(str(node.module), fromlist=["_"])
            for alias in node.names:
                assert hasattr(module, alias.name), f"{script.name} imports {node.module}.{alias.name}"
