"""Take models out of wrappers, and refuse unsuitable ones before the long work."""

import inspect

import torch
from torch import nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.tracing.duplicates import duplicate
from fmpq_fx.quant import QuantizedLayer


def unwrapped(model: nn.Module) -> nn.Module:
    """Return ``model`` without the wrappers of torch.compile and DataParallel.

    Raises:
        TypeError: ``model`` is no nn.Module.
        FmpqError: it is scripted or quantized already, or its forward needs more than images.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            break
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"the model is {what}; pass a torch.nn.Module, made and with its trained weights loaded"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name!r}" if name else "the model"
            raise FmpqError(f"{what} is scripted (torch.jit); pass the nn.Module that it was made from")
        if isinstance(module, QuantizedLayer):
            raise FmpqError("the model is quantized already; pass the float model that it was made from")
    image_argument(model)
    return model


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in evaluation mode that shares nothing with it and has no compiled parts."""
    twin = duplicate(model).eval()
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch._dynamo.OptimizedModule):
                setattr(parent, name, child._orig_mod)
    return twin


def image_argument(model: nn.Module) -> str:
    """Return the name of the argument of ``model``'s forward that takes images.

    Raises:
        FmpqError: there is none, or there are more arguments without defaults.
    """
    kinds = inspect.Parameter
    given = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    name = given[0].name if given and given[0].kind is not kinds.KEYWORD_ONLY else "x"
    wanted = [p.name for p in given if p.default is kinds.empty]
    if more := [other for other in wanted if other != name]:
        raise FmpqError(
            f"the forward of {type(model).__name__} wants {', '.join(map(repr, more))} besides images. Models of video "
            "frames or of conditions cannot be quantized as they are: wrap the model into one whose forward takes "
            "images alone, hands it the rest, and returns its dict"
        )
    return name
