"""Calls of modules: put arguments by name into their positions, whatever the class names them."""

import inspect
from typing import Any

from torch import nn


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that the forward of ``module`` takes by position, in order."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in by_position)


def in_order(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, as many of them by position as can be.

    Args:
        names: the names of the arguments that the callee takes by position, in order.
        args: the arguments of the call by position.
        kwargs: the arguments of the call by name. Those behind an argument that is left out stay here.
    """
    placed, named = list(args), dict(kwargs)
    for name in names[len(args) :]:
        if name not in named:
            break
        placed.append(named.pop(name))
    return tuple(placed), named


class CalledAlike(nn.Module):
    """A module that replaces another, and is called in the same way.

    Its forward and its hooks get by position all arguments that the other takes by position.

    Args:
        other: the module whose place it takes.
    """

    def __init__(self, other: nn.Module):
        super().__init__()
        known = other.names_given if isinstance(other, CalledAlike) else argument_names(other)
        self.names_given: tuple[str, ...] = known  # the names that callers use for arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with the argument names of the other one."""
        args, kwargs = in_order(self.names_given, args, kwargs)
        return super().__call__(*args, **kwargs)
