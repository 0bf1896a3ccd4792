"""Find the node that computes each value of a running model, also after writes to its memory."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from fmpq_fx.passes.tracing.functions import set_item, written_through
from fmpq_fx.passes.tracing.numbers import TracedFloat, TracedInt, plain
from fmpq_fx.passes.tracing.refusals import UnrecordableError
from fmpq_fx.passes.tracing.state import State
from fmpq_fx.passes.tracing.tape import Deferred, Source, Tape
from fmpq_fx.passes.tracing.writes import Memory, View, shares_memory

_PLAIN = (
    int,
    float,
    bool,
    str,
    complex,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.layout,
    torch.memory_format,
)
_TYPES = {int: torch.int64, float: torch.float64, bool: torch.bool}  # as torch reads them


class Values:
    """Knows the sources of tensors and numbers.

    Args:
        tape: the graph that is recorded.
        state: the tensors that the model has.
        example: the images that the model runs on.
        name: the name of the argument that takes the images.
    """

    def __init__(self, tape: Tape, state: State, example: Tensor, name: str):
        self.tape, self.state = tape, state
        self.memory = Memory()
        self._sources = WeakTensorKeyDictionary()
        self._ungraded: set[Source] = set()  # sources that ran without gradients
        self._overwritten = WeakTensorKeyDictionary()  # tensors lost by a write to shared memory -> its line
        self._graded: dict[Source, bool] = {}  # whether a source has a gradient
        self._image = tape.call("placeholder", name, ())
        self._device, self._dtype = example.device, example.dtype
        self._asked_dtype: set[Any] = set()  # the code that asked for a dtype
        self._sources[example] = self._image
        self.memory.add(example, None)

    def source_of(self, tensor: Tensor) -> Source:
        """Return the source of ``tensor``."""
        if tensor in self._overwritten:
            raise UnrecordableError(
                f"reads a tensor that shares memory with one that was written to at {self._overwritten[tensor]}",
                "Read it before the write, or compute a new tensor instead of writing.",
            )
        source: Source | None = self._sources.get(tensor)
        if source is None:
            name = self.state.read(tensor, self.tape.lines.here())
            source = self._sources[tensor] = self.tape.defer_attribute(name)
            self.memory.add(tensor, None)
        return source

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes ``tensor``, detached if it was computed without gradients."""
        source = self.source_of(tensor)
        if source in self._ungraded and torch.is_grad_enabled() and tensor.is_floating_point():
            source = self.tape.defer("detach", source)
        return self.tape.node(source)

    def shape_of(self, tensor: Tensor) -> torch.Size:
        """Return the sizes of ``tensor``, as numbers that the graph computes from it."""
        source = self.source_of(tensor)
        sizes = enumerate(tensor.shape)
        return torch.Size(
            [self.tape.number(size, self.tape.defer("size", source, dim)) for dim, size in sizes]
        )

    def note_dtype_asked(self) -> None:
        """Note that the running code asked for a tensor's dtype: a dtype that it passes on is then the images'."""
        self._asked_dtype.add(self.tape.lines.code())

    # From values to arguments of nodes.

    def arguments(self, value: Any) -> Any:
        """Return ``value`` with nodes in the places of tensors and of numbers that have a source."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, TracedInt | TracedFloat):
            return self.tape.node(value.source)
        if isinstance(value, slice):
            return slice(*map(self.arguments, (value.start, value.stop, value.step)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.arguments, value))
        if isinstance(value, tuple):
            return tuple(map(self.arguments, value))
        if isinstance(value, list | range):
            return list(map(self.arguments, value))
        if isinstance(value, dict):
            return {key: self.arguments(item) for key, item in value.items()}
        return self._constant(value)

    def _constant(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            same = value.type == self._device.type and value.index in (None, self._device.index)
            return self.tape.node(self.tape.defer(getattr, self._image, "device")) if same else value
        if value is self._dtype and self.tape.lines.code() in self._asked_dtype:
            return self.tape.node(self.tape.defer(getattr, self._image, "dtype"))
        if isinstance(value, _PLAIN):
            return plain(value)
        if isinstance(value, np.ndarray):
            what = f"an array of NumPy's, {value.shape}"
            name = self.state.add(torch.from_numpy(value), what, self.tape.lines.here())
            return self.tape.node(self.tape.defer_attribute(name))
        if isinstance(value, np.generic):
            return value.item()
        for kind, dtype in _TYPES.items():
            if value == kind:
                return dtype
        raise UnrecordableError(
            f"passes a {type(value).__name__} to torch",
            "Pass tensors, numbers and strings, which a graph can hold.",
        )

    # From results to their sources.

    def bind(self, out: Any, source: Source, view: View | None = None, piece: int | None = None) -> Any:
        """Note the source of all tensors in ``out``; return ``out`` with numbers that know their source.

        Args:
            out: the result of a call.
            source: the call.
            view: how ``out`` was made, in case it shares memory with its parent.
            piece: the number of ``out`` among the tensors that the view gives.
        """
        if isinstance(out, Tensor):
            self._sources[out] = source
            if not torch.is_grad_enabled():
                self._ungraded.add(source)
            if view is not None:
                shared = view.parent is not out and shares_memory(out, view.parent)
                view = view.of_piece(piece) if shared else None
            self.memory.add(out, view)
            return out
        if isinstance(out, dict):
            return type(out)((key, self._bind_item(item, source, key, view)) for key, item in out.items())
        if isinstance(out, tuple | list):
            items = [self._bind_item(item, source, i, view) for i, item in enumerate(out)]
            if all(item is before for item, before in zip(items, out, strict=True)):
                return out  # its type is kept
            return torch.Size(items) if isinstance(out, torch.Size) else type(out)(items)
        return self.tape.number(out, source)

    def _bind_item(self, item: Any, source: Source, key: Any, view: View | None) -> Any:
        return self.bind(item, self.tape.defer_item(source, key), view, key if isinstance(key, int) else None)

    # Writes.

    def written(self, tensor: Tensor, source: Source) -> None:
        """Note that ``tensor``, and tensors that share its memory, were overwritten with the value of ``source``."""
        where = self.tape.lines.here()
        self._check_write(tensor)
        self._sources[tensor] = source
        updated = [tensor]
        while (view := self.memory.view_of(updated[-1])) is not None:
            self._check_write(view.parent)
            if view.method is None:
                break
            self._sources[view.parent] = self._through(view, updated[-1])
            updated.append(view.parent)
        for other in self.memory.overlapping(tensor):
            if any(other is known for known in updated):
                continue
            view = self.memory.view_of(other)
            if (
                view is not None
                and view.method is not None
                and any(view.parent is known for known in updated)
            ):
                self._sources[other] = self._again(view)
                updated.append(other)
            else:
                self._overwritten[other] = where

    def _check_write(self, tensor: Tensor) -> None:
        name = self.state.name_of(tensor)
        if name is not None:
            raise UnrecordableError(
                f"writes to {name!r}, which belongs to the model",
                "Compute a new tensor instead. A weight that is masked is best masked where it is used, "
                "F.conv2d(x, self.weight * self.mask, ...), with the mask a buffer of the layer.",
            )
        if not torch.is_grad_enabled() and self._has_gradient(self._sources.get(tensor)):
            raise UnrecordableError(
                "writes within torch.no_grad() to a tensor that was computed with gradients",
                "Compute a new tensor instead, or write outside of torch.no_grad().",
            )

    def _has_gradient(self, source: Any) -> bool:
        """Say whether ``source`` is computed, with gradients, from the images or from parameters."""
        if source in self._ungraded or not isinstance(source, fx.Node | Deferred):
            return False
        if source not in self._graded:
            node = self.tape.node(source)
            reads = any(map(self._has_gradient, node.all_input_nodes))
            trained = node.op == "get_attr" and self.state.is_trained(str(node.target))
            self._graded[source] = reads or trained or node.op in ("placeholder", "call_module")
        return self._graded[source]

    def _through(self, view: View, written: Tensor) -> fx.Node:
        """Return the node of the parent of ``view``, now that the view was ``written`` to."""
        parent, value = self.node_of(view.parent), self.node_of(written)
        if view.method == "__getitem__":
            return self.tape.call("call_function", set_item, (parent, view.args[0], value))
        args = (parent, value, view.piece, view.method, *view.args)
        return self.tape.call("call_function", written_through, args, dict(view.kwargs))

    def _again(self, view: View) -> Source:
        """Return the source that makes ``view`` again, from the present values of its parent."""
        parent = self.node_of(view.parent)
        assert view.method is not None  # asked by the caller
        if view.method == "__getitem__":
            return self.tape.defer_item(parent, view.args[0])
        if not callable(getattr(Tensor, view.method)):
            return self.tape.defer(getattr, parent, view.method)
        made = self.tape.call("call_method", view.method, (parent, *view.args), dict(view.kwargs))
        return made if view.piece is None else self.tape.defer_item(made, view.piece)
