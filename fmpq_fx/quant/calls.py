"""How a module is called: by position, or by the names that its class has for what it is given."""

import inspect
from typing import Any

from torch import nn


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what the forward of ``module`` takes by position, in order."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in by_position)


def in_order(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, as many of them by position as can be.

    Args:
        names: of those that the callee takes by position, in order.
        args: that the call gives by position.
        kwargs: that it gives by name. One that follows an argument that is left out stays here.
    """
    placed, named = list(args), dict(kwargs)
    for name in names[len(args) :]:
        if name not in named:
            break
        placed.append(named.pop(name))
    return tuple(placed), named


class CalledAlike(nn.Module):
    """A module that takes the place of another, whose callers go on to call it as they did.

    Its own forward, and its hooks, get by position what the other takes by position.

    Args:
        other: the module whose place it takes.
    """

    def __init__(self, other: nn.Module):
        super().__init__()
        known = other.names_given if isinstance(other, CalledAlike) else argument_names(other)
        self.names_given: tuple[str, ...] = known  # to arguments, by callers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, with the names of arguments that the other module has."""
        args, kwargs = in_order(self.names_given, args, kwargs)
        return super().__call__(*args, **kwargs)
