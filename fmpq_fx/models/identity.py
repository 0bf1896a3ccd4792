"""The identity of a model in a file, from which the model can be made again without pickle."""

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from compressai.entropy_models import EntropyModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmpq_fx.errors import FmpqError
from fmpq_fx.models.checkpoint import misfit
from fmpq_fx.models.zoo import model_names, sized, zoo_name
from fmpq_fx.storage.tensor_packing import name_of

Model = nn.Module | Callable[[], nn.Module]


def identity_of(model: nn.Module) -> dict[str, Any]:
    """Return the facts, for JSON, from which :func:`made` makes ``model`` again, together with its state dict."""
    state = model.state_dict()
    name = zoo_name(model)
    if name is not None and _blank(name, state) is None:
        name = None  # the shapes of the weights do not determine all arguments of its constructor
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    cls = type(model)
    made = {"class": f"{cls.__module__}.{cls.__qualname__}", "zoo": name}
    return {**made, "dtype": name_of(dtype)}


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


class _Valueless(TorchFunctionMode):
    """Within the block, operations of constructors that only change values are skipped for tensors without values.

    Other operations may get tensors without values and tensors with values (made from lists) together.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.eye and len(args) == 1:
            func, args = torch.empty, args * 2
        first, *others = args or (kwargs.get("tensor"),)
        alone = all(not isinstance(value, Tensor) or value.numel() == 1 for value in others)
        if func in _ELEMENTWISE and isinstance(first, Tensor) and first.is_meta and alone:
            return first
        if any(isinstance(value, Tensor) and value.is_meta for value in args):
            args = [value.to("meta") if isinstance(value, Tensor) else value for value in args]
        return func(*args, **kwargs)


# These functions take most of the time of constructors on tensors without values.
_ELEMENTWISE = {nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.add, Tensor.mul, torch.max, torch.sqrt}


def _blank(name: str, state: dict[str, Tensor]) -> nn.Module | None:
    """Return a model ``name`` of the zoo with the names and shapes of ``state``, and no values yet.

    It takes no memory, whatever the shapes. None: the zoo cannot make such a model.
    """
    try:
        with torch.device("meta"), torch.no_grad(), _Valueless():
            model = sized(name, {key: value.to("meta") for key, value in state.items()})
    except (RuntimeError, KeyError, IndexError):  # ELIC's class, for one, reads values
        return None
    _make_room(model, state)
    return model if _shapes(model.state_dict(keep_vars=True)) == _shapes(state) else None


def given(model: Model | None, path: str | os.PathLike[str]) -> nn.Module | None:
    """Return a copy of the ``model`` that the user passed for the file ``path``, or call it; None for None.

    It is on the CPU, as what is read from files is. This runs the user's code, whose errors are no fault of the file.
    They pass through unchanged, with a note that says where the code was called (from Python 3.11 on, which has notes).

    Raises:
        TypeError: ``model`` is neither a model nor callable.
        Exception: any error of the user's code.
    """
    if not (model is None or callable(model)):  # a module can be called, too
        raise TypeError(f"model= is a {type(model).__name__}; pass a model, or what makes one")
    try:
        own = copy.deepcopy(model) if model is None or isinstance(model, nn.Module) else model()
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(
                f"This was raised by model={model!r}, which was to make the model of the file {path}."
            )
        raise
    return own.cpu() if isinstance(own, nn.Module) else own


def made(identity: dict[str, Any], state: dict[str, Tensor], own: nn.Module | None) -> nn.Module:
    """Return the model of this identity with the values of ``state``. A model of the zoo shares the tensors.

    Args:
        identity: the result of :func:`identity_of`.
        state: the state dict; it decides the sizes of a model of the zoo.
        own: the user's model (:func:`given`), which is used instead of one of the zoo.

    Raises:
        FmpqError: the zoo does not have the model, or cannot make it with these shapes, or ``own`` is no model or
            has other tensors.
    """
    if own is not None:
        if not isinstance(own, nn.Module):
            raise FmpqError(f"model= made a {type(own).__name__}; pass a model, or what makes one")
        return _loaded(own, state)
    name = identity["zoo"]
    if name is not None and name not in model_names():  # a file must not name a callable to import
        raise FmpqError(f"it names the model {name!r}, which CompressAI's zoo does not have")
    if name is None:
        raise FmpqError(
            f"it holds a {identity['class']}, which CompressAI's zoo cannot make from its weights; pass model=, such "
            "a model or what makes one (on the command line: --class package.module:callable)"
        )
    model = _blank(name, state)
    if model is None:
        raise FmpqError(f"its tensors are not those of a {name}")
    nn.Module.load_state_dict(model, state, assign=True)
    return model


def _loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load ``state`` into ``model``, which gets the dtypes of ``state``, and return it."""
    _make_room(model, state)
    if complaint := misfit(state, model.state_dict()):
        raise FmpqError(
            f"its tensors are not those of the {type(model).__name__} that was passed: {complaint}"
        )
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)
    nn.Module.load_state_dict(model, state)
    return model


def _make_room(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the buffers of entropy models, CDF tables above all, their sizes in ``state``."""
    for name, module in model.named_modules():
        if isinstance(module, EntropyModel):
            for key in dict(module.named_buffers(recurse=False)):
                stored = state.get(f"{name}.{key}" if name else key)
                if stored is not None:
                    module.register_buffer(key, stored.clone())
