"""The folders of the package: each says what it is for, and imports between them point down only."""

import ast
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from support import REPOSITORY

# From the ground up: a folder, or a file that lies loose in fmpq_fx/, imports only what stands before it.
LEVELS = [
    *("errors", "memory", "rd", "ranks", "progress", "samples"),
    *("quant", "exact", "storage", "history", "models", "images"),
    *("passes.plan", "passes.tracing", "passes", "passes.measure", "passes.clip", "passes.lower"),
    *("job", "pipeline", "training", "coding", "onnx", "formats", "report", "cli"),
]
FILES = {
    ".".join(("fmpq_fx", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
    for root in (REPOSITORY / "fmpq_fx", REPOSITORY)
    for path in (root if root.name == "fmpq_fx" else root / "passes").rglob("*.py")
}
FOLDERS = sorted(name for name, path in FILES.items() if path.name == "__init__.py" and name != "fmpq_fx")


def room(module: str) -> str:
    """Return the level that ``module`` belongs to: its folder, or its own name where it lies loose."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in LEVELS:
            return name
    return ""


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that the file at ``path`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fmpq_fx"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fmpq_fx"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else str(node.module)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module: str) -> None:
    if module in ("fmpq_fx", "fmpq_fx.__main__"):
        pytest.skip("the front door may import everything")
    own = room(module)
    assert own or module in ("fmpq_fx._compressai", "fmpq_fx.data"), f"{module} lies on no level"
    for imported in imports(FILES[module]):
        below = room(imported)
        assert below in LEVELS, f"{module} imports {imported}, which lies on no level"
        assert below == own or LEVELS.index(below) < LEVELS.index(own), (
            f"{module} imports {imported}, above it"
        )


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_says_what_it_is_for(folder: str) -> None:
    text = ast.get_docstring(ast.parse(FILES[folder].read_text()))
    assert text, f"{folder} does not say what it is for"


def test_every_folder_is_installed() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    assert sorted(config["options"]["packages"].split()) == ["fmpq_fx", *FOLDERS]
