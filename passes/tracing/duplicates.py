"""Copies of models in little time."""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

_CONTAINERS = (dict, OrderedDict, list, set)


def duplicate(model: M) -> M:
    """Return what ``copy.deepcopy`` returns, in little more than half the time."""
    return copy.deepcopy(model, copies_of_empty(model.modules()))


def copies_of_empty(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """Return a memo for ``copy.deepcopy`` with copies of the empty containers of ``modules``.

    Each module has a dozen for hooks, which take deepcopy most of its time.
    """
    containers = (value for module in modules for value in vars(module).values())
    return {id(value): type(value)() for value in containers if type(value) in _CONTAINERS and not value}
