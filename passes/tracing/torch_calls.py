"""Turn calls of torch into nodes: operators as fx records them, methods by name, functions as they are."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OPERATORS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "pow", "matmul", "neg")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "div": operator.truediv,
    "remainder": operator.mod,
    "__floordiv__": operator.floordiv,
    "__getitem__": operator.getitem,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
}
_REFLECTED = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rmatmul__": operator.matmul,
}
_METHODS: dict[Any, str] = {}
for _name in sorted(dir(Tensor), reverse=True):  # if a method has two names, the plain one stays
    _method = getattr(Tensor, _name)
    if callable(_method) and not isinstance(_method, type):
        _METHODS[_method] = _name

NO_VALUES = frozenset(
    [
        *("dim", "ndimension", "element_size", "get_device", "data_ptr", "storage_offset", "untyped_storage"),
        *(
            "is_contiguous",
            "is_complex",
            "is_floating_point",
            "is_signed",
            "is_tensor",
            "is_storage",
            "is_pinned",
        ),
        *("is_inference", "is_conj", "is_neg", "is_shared", "is_set_to", "is_same_size", "has_names", "type"),
        *("__hash__", "__repr__", "__format__", "__dir__", "register_hook", "requires_grad_", "retain_grad"),
        *("get_default_dtype", "can_cast", "result_type", "promote_types", "__reduce_ex__"),
    ]
)
"""Calls that ask a tensor for something other than values or sizes."""

DECISIONS = frozenset(["__bool__", "is_nonzero", "equal", "allclose", "__contains__"])
"""Calls that ask values for a yes or a no."""

PLAIN_NUMBERS = {
    "__int__": int,
    "__float__": float,
    "__complex__": complex,
    "__index__": operator.index,
    "__len__": len,
}
"""Methods from which Python wants a plain number, and the function that calls each."""

PIECES = frozenset(["split", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit"])
"""Functions whose number of results depends on a size of their input."""

RANDOM = frozenset(
    [
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"),
        *("bernoulli_", "normal", "normal_", "uniform_", "random_", "exponential_", "multinomial", "poisson"),
    ]
)
"""Functions that draw random numbers."""


def method_name(func: Any) -> str | None:
    """Return the name of a method of tensors that does what ``func`` does to its first argument, or None."""
    name = str(_METHODS.get(func) or getattr(func, "__name__", ""))
    known = callable(getattr(Tensor, name, None)) and (name == "__getitem__" or not name.startswith("__"))
    return name if known and name != "detach" else None  # a write through detach() has no gradient


def node_of_call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...]]:
    """Return the kind, the target and the arguments of the node for a call of ``func``."""
    name = _METHODS.get(func)
    if name is None:
        return "call_function", func, args
    if name in _REFLECTED:
        return "call_function", _REFLECTED[name], args[::-1]
    if name in _OPERATORS and not kwargs and len(args) == (1 if name == "neg" else 2):
        return "call_function", _OPERATORS[name], args
    if name.startswith("__"):
        return "call_function", getattr(operator, name, None) or getattr(Tensor, name), args
    return "call_method", name, args


def is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Say whether a call of the function ``name`` writes to its first argument, judging by name and options."""
    return (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def out_of_place(func: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Any] | str, dict[str, Any]] | None:
    """Return the out-of-place form of ``func``, a function or a method's name, and its keyword arguments.

    It is ``clamp`` for ``clamp_``, and None if there is none.
    """
    if "inplace" in kwargs:
        return func, {**kwargs, "inplace": False}
    if "out" in kwargs:
        return func, {name: value for name, value in kwargs.items() if name != "out"}
    name = str(_METHODS.get(func) or getattr(func, "__name__", ""))
    base = name.strip("_") if not name.startswith("__i") else name.strip("_").removeprefix("i")
    if base in _OPERATORS and not kwargs:
        return _OPERATORS[base], kwargs
    if func in _METHODS:
        return (base, kwargs) if callable(getattr(Tensor, base, None)) else None
    function = getattr(torch, base, None) or getattr(F, base, None)
    return None if function is None else (function, kwargs)
