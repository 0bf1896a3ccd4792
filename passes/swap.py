"""Exchange modules of a model: the one place where a module takes the place of another."""

import operator
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def replace_modules(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each key of ``new`` by its value wherever it is registered below ``root``, under however many names.

    The new module may contain the old one.
    """
    for parent, name, old in _places(root, new):
        parent._modules[name] = new[old]


def _places(root: nn.Module, modules: Container[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return where ``modules`` are registered below ``root``: (parent, name, module)."""
    parents = root.modules()  # one walk for all: it takes as long as some layers
    return [
        (parent, name, m)
        for parent in parents
        for name, m in parent._modules.items()
        if m is not None and m in modules
    ]


@contextmanager
def substituted(root: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block, each of ``modules`` stands in ``root`` for the one that its key names."""
    new = {root.get_submodule(name): module for name, module in modules.items()}
    places = _places(root, new)
    for parent, name, old in places:
        parent._modules[name] = new[old]
    try:
        yield
    finally:
        for parent, name, old in places:
            parent._modules[name] = old


def with_replaced(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of ``root`` with some modules replaced; ``root`` itself is not changed.

    The module that is returned and the modules on the way to the new ones are shallow copies. All others, and all
    parameters and buffers, are those of ``root``. Where nothing changes, ``root`` itself is returned.

    Args:
        root: a model. Its modules may also keep modules in dicts and lists, as CompressAI's latent codecs do. Hooks
            that are modules are not replaced.
        new: the replacement of each module, by that module.
    """
    made: dict[nn.Module, nn.Module] = dict(new)

    def of(value: Any) -> Any:
        if isinstance(value, nn.Module):
            if value not in made:
                made[value] = value  # for a module that leads back to this one
                attributes = {
                    name: other
                    for name, part in value.__dict__.items()
                    if isinstance(part, _HOLDERS) and name not in _PASSED_OVER
                    if (other := of(part)) is not part
                }
                if attributes:
                    made[value] = shallow_copy(value, type(value))
                    made[value].__dict__ |= attributes
            return made[value]
        if type(value) in (dict, OrderedDict):
            changed = {key: other for key, part in value.items() if (other := of(part)) is not part}
            return type(value)(value | changed) if changed else value
        if type(value) in (list, tuple):
            items = [of(part) for part in value]
            return value if all(map(operator.is_, items, value)) else type(value)(items)
        return value

    result: nn.Module = of(root)
    return result


_HOLDERS = (nn.Module, dict, list, tuple)  # what may be or hold a module
_PASSED_OVER = frozenset(vars(nn.Module())) - {"_modules"}  # what every module has: tensors, hooks and flags


def shallow_copy(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> nn.Module:
    """Return a module of the class ``cls`` with everything that ``module`` has, and ``attributes`` set besides."""
    twin = object.__new__(cls)
    # Not by copy.copy(), which some classes refuse, although sharing their attributes is harmless.
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules), **attributes}
    return twin


def subclass(cls: type[nn.Module], *bases: type[nn.Module]) -> type[nn.Module]:
    """Return the one class that inherits from ``bases`` and has the name of ``cls``, which is one of them."""
    names = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return _CLASSES.get(bases) or _CLASSES.setdefault(bases, type(cls.__name__, bases, names))


_CLASSES: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}
