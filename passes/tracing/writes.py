"""Track tensors that share memory while a model is traced: a write to one changes its views and its parents."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class View:
    """How a tensor was made that shares memory with another one."""

    parent: Tensor  # the tensor that it is a view of
    method: str | None  # the method or attribute of the parent that made it; None if no such one did
    args: tuple[Any, ...] = ()  # the method's arguments, with nodes in the places of values
    kwargs: tuple[tuple[str, Any], ...] = ()
    piece: int | None = None  # its number among the tensors that the method gives

    def of_piece(self, piece: int | None) -> "View":
        """Return how one of several tensors was made."""
        return replace(self, piece=piece)


class Memory:
    """Knows which of the living tensors share memory, and how each was made."""

    def __init__(self) -> None:
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._sharing: dict[int, list[weakref.ref[Tensor]]] = {}  # by address, in the order of their making

    def add(self, tensor: Tensor, view: View | None) -> None:
        """Add ``tensor``; ``view`` says how it was made if it shares its parent's memory."""
        address = _address(tensor)
        if not address:
            return
        sharing = [known for known in self._sharing.get(address, ()) if known() is not None]
        if not any(known() is tensor for known in sharing):
            sharing.append(weakref.ref(tensor))
        self._sharing[address] = sharing
        if view is not None and view.parent is not tensor:
            self._views[tensor] = view

    def view_of(self, tensor: Tensor) -> View | None:
        """Return how ``tensor`` was made if it is a view; else None."""
        view: View | None = self._views.get(tensor)
        return view

    def overlapping(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the other tensors that a write to ``tensor`` changes, the oldest first."""
        for known in self._sharing.get(_address(tensor), ()):
            other = known()
            if other is not None and other is not tensor and _overlap(tensor, other):
                yield other


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors lie in the same allocation."""
    return bool(_address(a)) and _address(a) == _address(b)


def _address(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        return 0
    return int(tensor.untyped_storage().data_ptr())


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.dtype.itemsize != b.dtype.itemsize:
        return True
    touched = torch.zeros(a.untyped_storage().nbytes() // a.dtype.itemsize, dtype=torch.bool)
    touched.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(touched.as_strided(b.shape, b.stride(), b.storage_offset()).any())
