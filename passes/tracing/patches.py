"""Exchange functions of torch and Python while a model is traced, and restore them afterwards, whatever happens."""

import contextlib
import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from compressai.entropy_models import EntropyModel
from torch import nn

from fmpq_fx.passes.tracing.recording import Recording
from fmpq_fx.passes.tracing.sources import own_modules
from fmpq_fx.passes.tracing.stand_ins import math_functions, python_names, unused_names
from fmpq_fx.passes.tracing.turns import TRACING

_MISSING = object()
_EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack")


@contextlib.contextmanager
def patched(recording: Recording, root: nn.Module) -> Iterator[None]:
    """Within the block, calls that torch does not dispatch reach ``recording`` as well.

    In other threads the exchanged functions do what they did before. Only threads that trace as well wait for the end.
    """
    with TRACING, contextlib.ExitStack() as stack:
        for (owner, name), value in _exchanged(recording, root).items():
            stack.callback(_restore, owner, name, vars(owner).get(name, _MISSING))
            setattr(owner, name, value)
        yield


def _exchanged(recording: Recording, root: nn.Module) -> dict[tuple[Any, str], Any]:
    """Return the stand-ins by the attributes, (class or Python module, name), that they replace."""
    exchanged: dict[tuple[Any, str], Any] = {
        (nn.Module, "__call__"): _module_call(recording),
        (torch.autograd.Function, "apply"): _autograd_apply(recording),
        (EntropyModel, "quantize"): _quantize(recording),
        (nn.Module, "training"): _Training(recording),
        # These checks of values would all become conditions of the graph.
        (torch.distributions.Distribution, "_validate_args"): _Unchecked(recording),
        (torch.utils.checkpoint, "checkpoint"): _checkpoint(recording),
    }
    exchanged |= {(math, name): function for name, function in math_functions().items()}
    einops: Any = sys.modules.get("einops")
    if einops is not None:  # if they were traced into, their caches would mix sizes
        exchanged |= {(einops, name): _whole(recording, getattr(einops, name)) for name in _EINOPS}
    originals = {
        id(vars(owner)[name]): stand_in for (owner, name), stand_in in exchanged.items() if callable(stand_in)
    }
    names = python_names(recording.ask)
    for module in own_modules(root):
        exchanged |= {(module, name): names[name] for name in unused_names(module, names)}
        imported = {name: originals.get(id(value)) for name, value in vars(module).items()}
        exchanged |= {(module, name): stand_in for name, stand_in in imported.items() if stand_in is not None}
    return exchanged


class _Training:
    """The ``training`` attribute of modules, which notes that it was read."""

    def __init__(self, recording: Recording):
        self.recording = recording

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None or "training" not in vars(module):
            raise AttributeError("training")
        self.recording.asks_mode |= not self.recording.paused
        return vars(module)["training"]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)["training"] = value


class _Unchecked:
    """The switch by which distributions check their arguments: off where they are recorded."""

    def __init__(self, recording: Recording):
        self.recording, self.elsewhere = recording, torch.distributions.Distribution._validate_args

    def __get__(self, instance: Any, owner: type) -> bool:
        return self.elsewhere and not self.recording.thread.is_current()


def _checkpoint(recording: Recording) -> Callable[..., Any]:
    """Return a stand-in for torch's checkpoint, which only calls the function: checkpoints change no result."""
    original = torch.utils.checkpoint.checkpoint
    known = ("use_reentrant", "context_fn", "determinism_check", "debug", "preserve_rng_state", "early_stop")

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not recording.thread.is_current():
            return original(function, *args, **options)
        return function(*args, **{name: value for name, value in options.items() if name not in known})

    return run


def _restore(owner: type | types.ModuleType, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _module_call(recording: Recording) -> Callable[..., Any]:
    original = nn.Module.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if recording.paused:
            return original(self, *args, **kwargs)
        with recording.running(self):
            if id(self) in recording.names:
                if id(self) in recording.whole:
                    return recording.call_module(self, functools.partial(original, self), args, kwargs)
            elif type(self).__name__ in ("Rearrange", "Reduce") and type(self).__module__.startswith(
                "einops."
            ):
                function = getattr(sys.modules["einops.einops"], type(self).__name__.lower())
                how = (self.pattern, self.reduction) if hasattr(self, "reduction") else (self.pattern,)
                return recording.call_function(function, (*args, *how), self.axes_lengths)
            return original(self, *args, **kwargs)

    return call


def _autograd_apply(recording: Recording) -> Any:
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = original.__get__(None, cls)
        return call(*args, **kwargs) if recording.paused else recording.call_autograd(cls, call, args)

    return classmethod(apply)


def _quantize(recording: Recording) -> Callable[..., Any]:
    """Return a stand-in that records rounding by an entropy model as :class:`fmpq_fx.quant.QuantizeLatent`."""
    original = EntropyModel.quantize

    def quantize(self: Any, inputs: Any, mode: str, means: Any = None) -> Any:
        usual = mode == ("noise" if self.training else "dequantize") and id(self) in recording.names
        if recording.paused or not usual:
            return original(self, inputs, mode, means)

        def call(inputs: Any, means: Any = None) -> Any:
            return original(self, inputs, mode, means)

        return recording.quantize_latent(self, call, (inputs,) if means is None else (inputs, means))

    return quantize


def _whole(recording: Recording, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (
            function(*args, **kwargs) if recording.paused else recording.call_function(function, args, kwargs)
        )

    return call
