"""Record the calls of torch while a model runs, each operation beside its value."""

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmpq_fx.passes.tracing.functions import changed, set_item
from fmpq_fx.passes.tracing.leaves import FunctionCall, kept_whole
from fmpq_fx.passes.tracing.numbers import TracedFloat, TracedInt, plain
from fmpq_fx.passes.tracing.refusals import UnrecordableError
from fmpq_fx.passes.tracing.sources import Lines
from fmpq_fx.passes.tracing.state import State
from fmpq_fx.passes.tracing.tape import Source, Tape
from fmpq_fx.passes.tracing.torch_calls import (
    DECISIONS,
    NO_VALUES,
    PIECES,
    PLAIN_NUMBERS,
    is_in_place,
    method_name,
    node_of_call,
    out_of_place,
)
from fmpq_fx.passes.tracing.turns import Thread
from fmpq_fx.passes.tracing.values import Values
from fmpq_fx.passes.tracing.writes import View, shares_memory
from fmpq_fx.quant import QuantizeLatent, argument_names, in_order, quantized_class


class Recording(TorchFunctionMode):
    """Records the forward of a model while it runs on an example.

    Args:
        root: the model, a copy that is thrown away afterwards.
        example: the images that it runs on, (B, C, H, W).
        name: the name of the argument that takes the images.
        constants: the prefix for the names of tensors that do not belong to the model.
    """

    def __init__(self, root: nn.Module, example: Tensor, name: str, constants: str = "constant"):
        super().__init__()
        self.lines = Lines(root)
        self.tape = Tape(self.lines, getattr(type(root).forward, "__code__", None))
        self.state = State(root, constants)
        self.values = Values(self.tape, self.state, example, name)
        self.added: dict[str, nn.Module] = {}  # modules that the graph calls and the model does not have
        self.names = {id(module): path for path, module in root.named_modules()}
        self.whole = {id(module) for module in root.modules() if kept_whole(module)}
        # Whether the forward may do something else in training; if nothing asks for the mode, it cannot.
        self.asks_mode = any(_may_differ(module) for module in root.modules())
        self.stack: list[nn.Module] = []  # the modules that are running, or ran when an error was raised
        self.thread = Thread()
        self._paused = False

    @property
    def paused(self) -> bool:
        """Whether calls are not recorded now; calls in other threads never are."""
        return self._paused or not self.thread.is_current()

    @contextlib.contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        """Within the block, ``module`` runs."""
        self.stack.append(module)
        yield
        self.stack.pop()

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Within the block, nothing is recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` and record it."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.paused or name in NO_VALUES:
            return func(*_plain(args), **_plain(kwargs))
        if name == "__get__":
            return self._attribute(func, args[0])
        if name == "__set__":
            return self._set_attribute(func, *args)
        if name == "__setitem__":
            return self._set_item(func, *args)
        if name == "size":
            return self._size(*args, **kwargs)
        if name == "__iter__":
            return iter(self._call(Tensor.unbind, "unbind", (args[0], 0), {}))
        if name in PLAIN_NUMBERS:
            value, self.asks_mode = func(*args), True
            self.tape.expect(self.tape.defer(PLAIN_NUMBERS[name], self.values.node_of(args[0])), value)
            return value
        if name in ("numpy", "__array__"):
            advice = "Compute that with functions of torch, which are recorded."
            raise UnrecordableError("takes values out of torch, into NumPy", advice)
        return self._call(func, name, args, kwargs)

    # Questions to tensors.

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        name = func.__self__.__name__
        if name == "shape":
            return self.values.shape_of(tensor)
        if name == "dtype":
            self.values.note_dtype_asked()
        value = func(tensor)
        if not isinstance(value, Tensor) or name in ("grad", "_base"):
            return value
        node = self.tape.call("call_function", getattr, (self.values.node_of(tensor), name))
        # A write to x.data is a write to x that gradients do not know of.
        return self.values.bind(value, node, View(tensor, None if name == "data" else name))

    def _set_attribute(self, func: Any, tensor: Tensor, value: Any) -> None:
        if func.__self__.__name__ == "data":
            # Raises a better error if the tensor belongs to the model.
            self.values.written(tensor, self.values.source_of(tensor))
            raise UnrecordableError("assigns to .data of a tensor", "Compute a new tensor instead.")
        func(tensor, value)

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        sizes = self.values.shape_of(tensor)
        return sizes if dim is None else sizes[dim]

    def ask(self, tensor: Tensor, function: Callable[..., Any]) -> Any:
        """Return the number that ``function``, int or float, makes of a tensor, and record it."""
        if self.paused:
            return function(tensor)
        with self.pausing():
            value, self.asks_mode = function(tensor), True
        return self.tape.number(value, self.tape.defer(function, self.values.node_of(tensor)))

    # Computations.

    def _call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors((args, kwargs)))
        node_args, node_kwargs = self.values.arguments(args), self.values.arguments(kwargs)
        versions = list(map(_version, tensors))
        out = func(*_plain(args), **_plain(kwargs))
        written = [t for t, version in zip(tensors, versions, strict=True) if _version(t) != version]
        if not written and is_in_place(name, kwargs) and any(out is tensor for tensor in tensors):
            written = [out]  # in inference mode, writes are not counted
        if written:
            return self._write(func, name, written, out, node_args, node_kwargs)
        if isinstance(out, bool) and name in DECISIONS:
            self._decide(name, out, node_args, node_kwargs)
        if not _has_values(out):
            return out
        node = self.tape.call(*node_of_call(func, node_args, node_kwargs), node_kwargs)
        if name in PIECES and not isinstance((*args, *kwargs.values())[1], tuple | list):
            self.tape.expect(self.tape.defer(len, node), len(out))
        view = None
        if args and isinstance(args[0], Tensor):
            view = View(args[0], method_name(func), tuple(node_args[1:]), tuple(node_kwargs.items()))
        return self.values.bind(out, node, view)

    def _decide(self, name: str, answer: bool, args: Any, kwargs: Any) -> None:
        self.asks_mode = True  # layers may compute other values in training
        if name in ("equal", "allclose"):
            source: Source = self.tape.call("call_function", getattr(torch, name), args, kwargs)
        else:
            source = self.tape.defer(operator.contains if name == "__contains__" else bool, *args)
        self.tape.expect(source, answer)

    # Writes.

    def _write(self, func: Any, name: str, written: list[Tensor], out: Any, args: Any, kwargs: Any) -> Any:
        # Tensors that share memory share one count of writes, so all of them appear as written.
        if not all(
            out is tensor or (isinstance(out, Tensor) and shares_memory(out, tensor)) for tensor in written
        ):
            raise UnrecordableError(
                f"calls {name}, which writes to its arguments", "Compute new tensors instead."
            )
        form = out_of_place(func, kwargs)
        if form is None:
            node = self.tape.call("call_function", changed, (args[0], name, *args[1:]), kwargs)
        else:
            op = "call_method" if isinstance(form[0], str) else "call_function"
            node = self.tape.call(op, form[0], args, form[1])
        self.values.written(out, node)
        return out

    def _set_item(self, func: Any, tensor: Tensor, index: Any, value: Any) -> None:
        args = tuple(map(self.values.arguments, (tensor, index, value)))
        func(tensor, _plain(index), _plain(value))
        # x[i] += 1 writes to a view of x, and then writes the view to x[i], which changes nothing.
        before = self.values.source_of(tensor)
        if getattr(before, "target", None) is set_item and _same(before.args[1:], args[1:]):
            return
        self.values.written(tensor, self.tape.call("call_function", set_item, args))

    # Calls that are kept whole.

    def call_module(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a module of the model, which ``call`` runs; passes find the arguments by position."""
        args, kwargs = in_order(argument_names(module), args, kwargs)
        inplace = getattr(module, "inplace", False) is True
        return self._call_whole("call_module", self.names[id(module)], call, args, kwargs, inplace=inplace)

    def call_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a function that is not torch's."""
        return self._call_whole("call_function", function, function, args, kwargs)

    def call_autograd(self, function: Any, call: Callable[..., Any], args: Any) -> Any:
        """Record a call of a subclass of ``torch.autograd.Function``, which ``call`` runs."""
        return self._call_added(function.__name__, lambda: FunctionCall(function), call, args)

    def quantize_latent(self, model: nn.Module, call: Callable[..., Any], args: Any) -> Any:
        """Record a rounding by an entropy ``model`` as the call of a module, which adds noise in training."""
        return self._call_added(f"{self.names[id(model)]}_quantize", QuantizeLatent, call, args)

    def _call_added(self, name: str, make: Callable[[], nn.Module], call: Any, args: Any) -> Any:
        if name not in self.added:
            self.added[name] = make().eval()
        return self._call_whole("call_module", name, call, args, {})

    def _call_whole(
        self, op: str, target: Any, call: Callable[..., Any], args: Any, kwargs: Any, *, inplace: bool = False
    ) -> Any:
        tensors = list(_tensors((args, kwargs)))
        node_args, node_kwargs = self.values.arguments(args), self.values.arguments(kwargs)
        versions = list(map(_version, tensors))
        with self.pausing():
            out = call(*_plain(args), **_plain(kwargs))
        node = self.tape.call(op, target, node_args, node_kwargs)
        written = [t for t, version in zip(tensors, versions, strict=True) if _version(t) != version]
        if not written:
            if any(out is tensor for tensor in tensors):  # nn.Identity returns its input, for example
                with self.pausing():
                    out = out.view_as(out)
            return self.values.bind(out, node, View(tensors[0], None) if tensors else None)
        if not inplace or not any(out is tensor for tensor in written):
            raise UnrecordableError(f"calls {target}, which writes to its input", "Hand it a clone.")
        self.values.written(out, node)
        return out


def _may_differ(module: nn.Module) -> bool:
    """Say whether ``module`` may do something else in training without asking for ``training`` while recorded."""
    if type(module).train is not nn.Module.train:
        return True
    if any("training" in vars(cls) for cls in type(module).__mro__ if cls is not nn.Module):
        return True  # the class defines ``training`` itself, which is read unnoticed
    known = type(module).__module__.startswith(("torch.", "einops.", "compressai."))
    return kept_whole(module) and not known and quantized_class(module) is None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _has_values(out: Any) -> bool:
    if isinstance(out, tuple | list | dict):
        return any(map(_has_values, out.values() if isinstance(out, dict) else out))
    return isinstance(out, Tensor | int | float) and not isinstance(out, bool)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _plain(value: Any) -> Any:
    """Return ``value`` with plain numbers in the places of traced ones."""
    if isinstance(value, TracedInt | TracedFloat):
        return plain(value)
    if isinstance(value, slice):
        return slice(*map(_plain, (value.start, value.stop, value.step)))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_plain, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    return bool(tuple(a) == tuple(b))
