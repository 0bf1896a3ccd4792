"""Compute how much memory a module takes for an input of a given size, without running it."""

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of the living tensors after each operation, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes by storage
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.note(value)
        convolves = func is torch.ops.aten.convolution.default
        workspace = _workspace(args[0], args[1], args[8], out) if convolves else 0
        self.peak = max(self.peak, sum(self.alive.values()) + workspace)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count ``tensor`` for as long as it lives."""
        storage = tensor.untyped_storage()
        if id(storage) not in self.alive:
            self.alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, id(storage))


def _workspace(x: Tensor, weight: Tensor, groups: int, out: Tensor) -> int:
    """Return the bytes that a convolution takes besides its input and its output, as measured on CPUs.

    Up to float32, the library copies tensors into its own layout. In float64, torch makes a matrix with a column for
    each place.
    """
    if x.dtype.itemsize <= torch.float32.itemsize:
        return max(x.nbytes, out.nbytes)
    places = min(x[0, 0].numel(), out[0, 0].numel())
    return places * weight[0].numel() * groups * x.dtype.itemsize


@torch.no_grad()
def peak_bytes(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, tuple[int, ...]]:
    """Return the most bytes of tensors that ``module`` holds at once for an input, and the shape of its output.

    It runs on tensors without data. Weights are not counted; the input and the output are.

    Args:
        module: takes one tensor, returns one, and decides nothing by values. It is not modified.
        shape: the shape of the input, (B, C, H, W).
        dtype: the dtype of the input.
    """
    # A copy, since another thread may run the module meanwhile.
    tensors = [*module.parameters(), *module.buffers()]
    without_data = copy.deepcopy(module, {id(tensor): tensor.detach().to("meta") for tensor in tensors})
    with _Allocations() as allocations:
        out = without_data(torch.empty(shape, dtype=dtype, device="meta"))
    return allocations.peak, tuple(out.shape)
