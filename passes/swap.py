"""Exchange modules of a model: the one place where a module takes the place of another."""

from collections.abc import Iterator, Mapping
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


def with_replaced(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return ``root`` with other modules in the places of some, and leave ``root`` as it is.

    The module that is returned and the modules on the way to the new ones are shallow copies. All others, and all
    parameters and buffers, are those of ``root``. Where nothing changes, ``root`` itself is returned.

    Args:
        root: a model.
        new: what takes the place of a module, by that module.
    """
    made = dict(new)

    def of(module: nn.Module) -> nn.Module:
        if module not in made:
            made[module] = module
            children = {name: child and of(child) for name, child in module._modules.items()}
            if any(children[name] is not child for name, child in module._modules.items()):
                made[module] = shallow_copy(module, type(module))
                made[module]._modules = children
        return made[module]

    return of(root)


def shallow_copy(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return a module of the class ``cls`` that has the attributes, tensors and modules of ``module``."""
    twin = object.__new__(cls)
    # Not by copy.copy(): some classes refuse to be copied, though nothing is wrong with sharing what they have.
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return twin
