"""Change how torch computes while images are coded. The settings hold for the whole process, so threads take turns."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fmpq_fx.exact.layers import without_autocast

SWITCHES = threading.RLock()
"""The lock held while settings of the whole process are changed, so that no thread undoes another's change."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new tensors are ``dtype``: some decoders of CompressAI make tensors of the default type.

    Threads take turns, also if ``dtype`` is the default already: another thread may set another within the block.
    """
    with SWITCHES:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def other_kernels(device: torch.device) -> Iterator[None]:
    """Within the block, torch does without its main library of kernels on ``device`` (cuDNN or oneDNN)."""
    library: Any = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    with _set_to([(library, "enabled", False)]):
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the block, float32 is computed as float32: not in TF32, nor in half precision by autocast."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        cpu, gpu = backends.mkldnn, backends.cudnn
        owners = [cpu.matmul, cpu.conv, cpu.rnn, backends.cuda.matmul, gpu.conv, gpu.rnn]
        switches: list[tuple[Any, str, Any]] = [(owner, "fp32_precision", "ieee") for owner in owners]
    else:
        switches = [(owner, "allow_tf32", False) for owner in (backends.cuda.matmul, backends.cudnn)]
    with _set_to(switches), without_autocast(device):
        yield


@contextmanager
def _set_to(switches: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within the block, attributes of torch's backends have other values; threads take turns."""
    with SWITCHES, ExitStack() as stack:
        for owner, name, value in switches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
