"""Stand-ins for functions of Python while a model is traced, so that sizes keep their nodes.

Python's ``int(size)`` and ``len(tensor)`` always give plain numbers. So these names are bound to stand-ins in the
user's modules meanwhile.
"""

import ast
import builtins
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fmpq_fx.passes.tracing.numbers import Recorder, TracedFloat, TracedInt

Question = Callable[[Tensor, Callable[..., Any]], Any]
"""Takes a tensor and a function; returns the number ``function(tensor)``, and records it."""


def python_names(ask: Question) -> dict[str, Any]:
    """Return the stand-ins by the names of Python's functions."""
    return {
        "int": _number_type(int, TracedInt, ask),
        "float": _number_type(float, TracedFloat, ask),
        "min": _recorded(min),
        "max": _recorded(max),
        "len": lambda value: value.shape[0] if isinstance(value, Tensor) and value.ndim else len(value),
    }


def math_functions() -> dict[str, Callable[..., Any]]:
    """Return stand-ins for the functions of :mod:`math` that return numbers, by name."""
    skipped = ("ceil", "floor", "trunc", "fsum", "modf", "frexp", "dist", "sumprod")
    found = {name: getattr(math, name) for name in dir(math) if not name.startswith(("_", "is"))}
    return {
        name: _product if name == "prod" else _recorded(function)
        for name, function in found.items()
        if callable(function) and name not in skipped
    }


def unused_names(module: types.ModuleType, names: Iterable[str]) -> list[str]:
    """Return the ``names`` that can be bound to stand-ins in ``module``.

    These are names that it neither defines nor passes on, as ``x.to(int)`` does: torch only knows Python's own types.
    """
    handed_on = _handed_on(module)
    return [name for name in names if name not in vars(module) and name not in handed_on]


@functools.cache
def _handed_on(module: types.ModuleType) -> set[str]:
    """Return the names that the source of ``module`` passes to functions; all built-in names if it has no source."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return set(dir(builtins))
    return {
        value.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") not in ("isinstance", "issubclass")
        for value in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(value, ast.Name)
    }


def _recorder_of(values: Iterable[Any]) -> Recorder | None:
    return next((value.recorder for value in values if isinstance(value, TracedInt | TracedFloat)), None)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` of numbers so that a call is recorded if one of the numbers is traced."""

    def call(*args: Any, **options: Any) -> Any:
        numbers = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
        recorder = _recorder_of(numbers)
        if recorder is None or options or not all(isinstance(value, int | float) for value in numbers):
            return function(*args, **options)
        return recorder.apply(function, *numbers)

    return call


def _product(values: Iterable[Any], *, start: Any = 1) -> Any:
    for value in values:
        start = start * value
    return start


def _number_type(base: type, kind: type, ask: Question) -> Any:
    """Return the stand-in for ``base``, int or float; ``kind`` is its form that knows its source."""

    class Kind(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, base)

        def __subclasscheck__(cls, other: Any) -> bool:
            return issubclass(other, base)

        def __eq__(cls, other: object) -> bool:
            return other is base or other is cls

        def __hash__(cls) -> int:
            return hash(base)

        def __getattr__(cls, name: str) -> Any:
            return getattr(base, name)

    class StandIn(metaclass=Kind):
        def __new__(cls, *args: Any, **options: Any) -> Any:
            value = args[0] if args else 0
            if isinstance(value, Tensor):
                return ask(value, base)
            if isinstance(value, kind):
                return value
            recorder = _recorder_of((value,))
            return base(*args, **options) if recorder is None else recorder.apply(base, value)

    return StandIn
