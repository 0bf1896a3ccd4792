"""Functions that recorded graphs call where torch has none. None of them changes its arguments."""

from typing import Any

import numpy as np
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError


class DecisionError(FmpqError):
    """A forward would take another decision on these images than on the traced example."""


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return ``x`` with ``value`` at ``index``, as ``x[index] = value`` leaves it."""
    out = x.clone()
    out[index] = value
    return out


def changed(x: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``x`` as its in-place ``method`` leaves it: ``changed(x, "fill_", 1)``."""
    out = x.clone()
    getattr(out, method)(*args, **kwargs)
    return out


def written_through(
    x: Tensor, value: Tensor, piece: int | None, view: str, *args: Any, **kwargs: Any
) -> Tensor:
    """Return ``x`` after ``value`` was written to a view of it.

    Args:
        x: the tensor that was viewed.
        value: the values that the view has now.
        piece: the number of the written tensor if ``view`` gives several; None if it gives one.
        view: the method or attribute of ``x`` that made the view.
        *args: the arguments of the method.
        **kwargs: the keyword arguments of the method.
    """
    out = x.clone()
    made = getattr(out, view)
    made = made(*args, **kwargs) if callable(made) and not isinstance(made, Tensor) else made
    (made if piece is None else made[piece]).copy_(value)
    return out


def numpy_scalar(name: str, *args: Any) -> Any:
    """Return the result of NumPy's function ``name`` for numbers, as a Python number."""
    return getattr(np, name)(*args).item()


def expect(found: Any, answer: Any, where: str) -> None:
    """Check that a condition of the forward has the answer that it had when traced.

    Raises:
        DecisionError: it has another answer; ``where`` is the line of the condition.
    """
    if found != answer:
        raise DecisionError(
            f"the graph does not hold for these images: {where}\nThe forward decides there, and the graph was traced "
            f"where that gave {answer!r}; for these images it gives {found!r}. Use images of a size that gives "
            f"{answer!r}, or trace with an image like these (prepare() traces with the first of calibration=)"
        )


fx.node.has_side_effect(expect)
