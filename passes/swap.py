"""Exchange modules of a model: the one place where a module takes the place of another."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered below ``root``, under however many names."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


@contextmanager
def substituted(root: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Within the block, ``module`` stands in ``root`` for the one that ``name`` names."""
    old = root.get_submodule(name)
    replace_module(root, old, module)
    try:
        yield
    finally:
        replace_module(root, module, old)
