"""Numbers that know the node that computes them: sizes, and numbers that a forward computes from sizes.

To all other code they are ints and floats. Their arithmetic is recorded beside its result. Comparing one, or asking its
truth, is a decision of the forward, which the recorder is told. Where Python takes a plain number, to count a loop for
instance, the graph is bound to that number.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fmpq_fx.passes.tracing.functions import numpy_scalar
from fmpq_fx.passes.tracing.refusals import UnrecordableError


class Recorder(Protocol):
    """Records the arithmetic of numbers."""

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the result of ``function`` for numbers, as a number that knows its node."""

    def decide(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the answer of ``function``, which the forward decides on."""

    def pin(self, number: Any) -> Any:
        """Return ``number`` as a plain one; the graph is bound to it."""


class TracedInt(torch.SymInt):
    """An int that knows its source.

    A subclass of int would lose its source wherever C code reads it, as in ``0.5 * height``. torch takes symbolic
    numbers everywhere, and Python calls their methods.
    """

    def __init__(self, value: int, source: Any, recorder: Recorder):
        self.value, self.source, self.recorder = value, source, recorder

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that isinstance sees."""
        return int

    @property
    def node(self) -> Any:  # type: ignore[override]
        """Refuse: torch asks for this where it computes with a size itself, outside of recorded functions."""
        raise UnrecordableError(
            "hands a size to torch where it cannot be recorded",
            "Make tensors with torch.tensor(...) or torch.full(...) instead of torch.Tensor(...).",
        )


class TracedFloat(float):
    """A float that knows its source."""

    source: Any
    recorder: Recorder


Traced = TracedInt | TracedFloat


def traced(value: Any, source: Any, recorder: Recorder) -> Any:
    """Return ``value`` as a number that ``source`` computes; unchanged if it is no int or float."""
    if type(value) is int:
        return TracedInt(value, source, recorder)
    if type(value) is not float:
        return value
    number = TracedFloat(value)
    number.source, number.recorder = source, recorder
    return number


def plain(number: Any) -> Any:
    """Return ``number`` as a plain Python int or float."""
    if isinstance(number, TracedInt):
        return number.value
    if isinstance(number, TracedFloat):
        return float.__float__(number)
    return number.item() if type(number).__module__ == "numpy" and not getattr(number, "ndim", 0) else number


def _arithmetic(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def method(self: Traced, *others: Any) -> Any:
        if not all(isinstance(other, int | float) for other in others):
            return NotImplemented
        return self.recorder.apply(function, *((*others[::-1], self) if reflected else (self, *others)))

    return method


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Traced, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        return self.recorder.decide(function, self, other)

    return method


def _of_numpy(self: Traced, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
    """Apply one of NumPy's functions to single numbers: np.ceil(height / 8)."""
    if method != "__call__" or options or any(getattr(value, "ndim", 0) for value in inputs):
        return getattr(ufunc, method)(*(self.recorder.pin(v) for v in inputs), **options)
    return self.recorder.apply(numpy_scalar, ufunc.__name__, *inputs)


def _divmod(self: Traced, other: Any) -> Any:
    return self // other, self % other


def _rdivmod(self: Traced, other: Any) -> Any:
    return other // self, other % self


_BINARY = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
_BITWISE = ("and_", "or_", "xor", "lshift", "rshift")


def _equip(cls: type, base: type, binary: tuple[str, ...], unary: tuple[str, ...]) -> None:
    methods: dict[str, Any] = {"__array_ufunc__": _of_numpy, "__divmod__": _divmod, "__rdivmod__": _rdivmod}
    for name in binary:
        function, short = getattr(operator, name), name.strip("_")
        methods[f"__{short}__"], methods[f"__r{short}__"] = _arithmetic(function), _arithmetic(function, True)
    for name in unary:
        methods[f"__{name}__"] = _arithmetic(getattr(operator, name))
    for function in (math.ceil, math.floor, math.trunc, round):
        methods[f"__{function.__name__}__"] = _arithmetic(function)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        methods[f"__{name}__"] = _comparison(getattr(operator, name))
    methods["__bool__"] = lambda self: self.recorder.decide(operator.truth, self)
    methods["__int__"] = lambda self: int(self.recorder.pin(self))
    methods["__float__"] = lambda self: float(self.recorder.pin(self))
    methods["__hash__"] = lambda self: hash(plain(self))
    methods["__repr__"] = lambda self: repr(plain(self))
    methods["__format__"] = lambda self, form: format(plain(self), form)
    if base is int:
        methods["__index__"] = methods["__int__"]
    methods["__deepcopy__"] = lambda self, memo: plain(self)
    methods["__reduce__"] = lambda self: (base, (plain(self),))
    for name, method in methods.items():
        setattr(cls, name, method)


_equip(TracedInt, int, (*_BINARY, *_BITWISE), ("neg", "pos", "abs", "invert"))
_equip(TracedFloat, float, _BINARY, ("neg", "pos", "abs"))
