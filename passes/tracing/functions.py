"""What a recorded graph calls where torch has no function for it. Nothing here changes what it is given."""

from typing import Any

import numpy as np
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError


class DecisionError(FmpqError):
    """A forward would decide otherwise on these images than where it was traced."""


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return ``x`` with ``value`` at ``index``, as ``x[index] = value`` leaves it."""
    out = x.clone()
    out[index] = value
    return out


def changed(x: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the in-place ``method`` of ``x`` leaves there: ``changed(x, "fill_", 1)``."""
    out = x.clone()
    getattr(out, method)(*args, **kwargs)
    return out


def written_through(
    x: Tensor, value: Tensor, piece: int | None, view: str, *args: Any, **kwargs: Any
) -> Tensor:
    """Return ``x`` after ``value`` was written to a view of it.

    Args:
        x: what the view is of.
        value: what the view holds now.
        piece: which of the tensors that ``view`` gives; None where it gives one.
        view: the method, or the attribute, of ``x`` that made the view.
        *args: of the method.
        **kwargs: of the method.
    """
    out = x.clone()
    made = getattr(out, view)
    made = made(*args, **kwargs) if callable(made) and not isinstance(made, Tensor) else made
    (made if piece is None else made[piece]).copy_(value)
    return out


def numpy_scalar(name: str, *args: Any) -> Any:
    """Return what NumPy's function ``name`` makes of numbers, as a number of Python's."""
    return getattr(np, name)(*args).item()


def expect(found: Any, answer: Any, where: str) -> None:
    """Check that a condition that the forward asked has the answer with which it was traced.

    Raises:
        DecisionError: it has another one; ``where`` says which it is.
    """
    if found != answer:
        raise DecisionError(
            f"the graph does not hold for these images: {where}\nThe forward decides there, and the graph was traced "
            f"where that gave {answer!r}; for these images it gives {found!r}. Use images of a size that gives "
            f"{answer!r}, or trace with such an image as these (prepare() traces with the first of calibration=)"
        )


fx.node.has_side_effect(expect)
