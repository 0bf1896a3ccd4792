"""Find the lines of code that are the user's own, so that errors and guards can show them."""

import functools
import linecache
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LIBRARIES = ("torch", "torchvision", "einops", "numpy", "scipy", "fmpq_fx", "builtins")
_STANDARD = sysconfig.get_path("stdlib")
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


def own_modules(model: nn.Module) -> list[types.ModuleType]:
    """Return the Python modules that the code of ``model`` lies in.

    They are the Python modules of its classes, of their base classes, and of the functions and objects that its modules
    keep; and the modules that these import from the same package or from loose files.
    """
    found: dict[str, types.ModuleType] = {}
    kept = [value for module in model.modules() for value in vars(module).values()]
    names = {_module_of(cls) for module in model.modules() for cls in type(module).__mro__}
    todo = [name for name in names | set(map(_module_of, kept)) if _is_own(name)]
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = sys.modules[name]
            todo += [other for other in map(_module_of, vars(found[name]).values()) if _belongs(other, name)]
    return list(found.values())


def _module_of(value: Any) -> str:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return name if isinstance(name, str) else ""


def _is_own(name: str) -> bool:
    """Say whether a model may be defined in the Python module ``name``: it has a file and is no library."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    standard = file.startswith(_STANDARD) and not _is_installed(file)
    return bool(file) and not standard and name.partition(".")[0] not in _LIBRARIES


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file


def _belongs(name: str, importer: str) -> bool:
    """Say whether the Python module ``name`` belongs to the same code as its ``importer``."""
    same = name.partition(".")[0] == importer.partition(".")[0]
    return _is_own(name) and (same or not _is_installed(str(sys.modules[name].__file__)))


class Lines:
    """Finds the line of the user's code that is running.

    Args:
        model: the model that is traced.
    """

    def __init__(self, model: nn.Module):
        self._files = {getattr(module, "__file__", None) for module in own_modules(model)}

    def here(self) -> str:
        """Return the innermost line of the user's code that is running now, "models/codec.py:12: y = x[0]"."""
        frames = list(_frames(sys._getframe(1)))
        return self.words([(frame.f_code.co_filename, frame.f_lineno) for frame in frames])

    def code(self) -> types.CodeType | None:
        """Return the code of the user's function that is running."""
        frames = _frames(sys._getframe(1))
        return next((frame.f_code for frame in frames if frame.f_code.co_filename in self._files), None)

    def in_forward(self, code: types.CodeType | None) -> str | None:
        """Return the running line of the function with this ``code``, as fx prints it; None if it is not running."""
        for frame in _frames(sys._getframe(1)):
            if frame.f_code is code:
                return _stack_trace(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return None

    def of_error(self, error: BaseException) -> str:
        """Return the innermost line of the user's code in the traceback of ``error``."""
        places, trace = [], error.__traceback__
        while trace is not None:
            places.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        return self.words(places[::-1])

    def words(self, places: list[tuple[str, int]]) -> str:
        """Return the first of ``places``, innermost first, in the user's code, or else outside torch and fmpq_fx."""
        own = [place for place in places if place[0] in self._files]
        other = [place for place in places if not place[0].startswith((_TORCH, _OURS))]
        file, line = (own or other or places)[0]
        return described(file, line)


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@functools.cache
def described(file: str, line: int) -> str:
    """Return the place and the text of a line. The path is cut :func:`short`, to tell nothing of the machine."""
    return f"{short(file)}:{line}: {linecache.getline(file, line).strip()}"


@functools.cache
def _stack_trace(file: str, line: int, name: str) -> str:
    return f'File "{short(file)}", line {line}, in {name}\n    {linecache.getline(file, line).strip()}'


def short(file: str) -> str:
    """Return the last three parts of a path, enough to find a file."""
    return "/".join(Path(file).parts[-3:])
