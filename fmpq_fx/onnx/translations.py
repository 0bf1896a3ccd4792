"""Replacements of functions that torch's exporter cannot translate, or would only export for the example's sizes."""

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmpq_fx.onnx.packages import package


def _attribute(value: Any, name: str, *default: Any) -> Any:
    """Return an attribute of ``value``; the export has no ``data`` of tensors, so they are detached instead."""
    return value.detach() if name == "data" else getattr(value, name, *default)


def _pooled(x: Tensor, output_size: Any) -> Tensor:
    """Return ``F.adaptive_avg_pool2d(x, output_size)``, by matrix products, which work for dynamic sizes."""
    if isinstance(output_size, int) or None in output_size:
        return F.adaptive_avg_pool2d(x, output_size)
    rows, columns = (
        _means(x.size(dim), places, x) for dim, places in zip((-2, -1), output_size, strict=True)
    )
    pooled: Tensor = rows @ x @ columns.T
    return pooled


def _means(size: Any, places: Any, like: Tensor) -> Tensor:
    """Return the matrix (places, size) that takes the means of ``places`` pieces of ``size`` values."""
    place, value = (torch.arange(count, device=like.device) for count in (places, size))
    starts, ends = place * size // places, ((place + 1) * size + places - 1) // places
    inside = (starts[:, None] <= value) & (value < ends[:, None])
    weights: Tensor = inside.to(like.dtype) / (ends - starts)[:, None]
    return weights


IN_PLACE: dict[Any, Callable[..., Any]] = {
    getattr: _attribute,
    F.adaptive_avg_pool2d: _pooled,
    # Python's own would turn sizes into plain numbers, or decide by them.
    int: torch.sym_int,
    float: torch.sym_float,
    min: lambda *numbers: reduce(torch.sym_min, numbers if len(numbers) > 1 else numbers[0]),
    max: lambda *numbers: reduce(torch.sym_max, numbers if len(numbers) > 1 else numbers[0]),
    math.sqrt: lambda number: number**0.5,
}
"""Function that a graph calls -> the function that is exported instead."""


def _rounded(number: Any, digits: None = None) -> Any:
    """Return ``round(number)`` in ONNX; torch's exporter does not translate it for numbers."""
    op, integer = package("onnxscript").opset18, package("onnx").TensorProto.INT64
    return op.Cast(op.Round(number), to=integer)


def _floor_divided(number: Any, divisor: Any) -> Any:
    """Return ``number // divisor`` of integers in ONNX; torch's exporter rounds negative quotients up."""
    op = package("onnxscript").opset18
    return op.Div(op.Sub(number, op.Mod(number, divisor)), divisor)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    round: _rounded,
    operator.floordiv: _floor_divided,
}
"""Function of sizes -> the ONNX operations that torch's exporter writes for it."""
