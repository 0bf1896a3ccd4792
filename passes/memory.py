"""How much memory measurements may take, and memory of freed tensors kept for the next ones."""

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# From glibc's malloc.h; the defaults are those of its manual, the trim threshold the most that it adapts to.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 64 * 2**20, 65536

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SHARE = 4  # the part of the machine's memory that is taken where nothing is said
_UNKNOWN = 8 * 2**30  # what a machine counts as that does not say how much memory it has

_blocks = 0  # that are open now, one in the other


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, glibc's malloc does not return large freed blocks to the kernel.

    It would otherwise map new pages for every activation of every run, and have each zeroed: a quarter and more
    of the time of an evaluation. At the end of the outermost block the memory is returned. With another C library
    nothing happens. (This is what PyTorch's tuning guide reaches with another allocator or environment variables.)
    """
    global _blocks
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _blocks += 1
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _blocks -= 1
        if not _blocks:
            libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
            libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
            libc.malloc_trim(0)


def memory_limit(memory: int | str | None, device: torch.device) -> int:
    """Return in bytes what ``memory`` says, or a quarter of the memory of the machine, or of the GPU, for None.

    Args:
        memory: bytes, or a number with a unit, "2GB", "512 MB" (1 GB is 2^30 bytes).
        device: where the values are.

    Raises:
        TypeError, ValueError: ``memory`` is no positive number of bytes.
    """
    if memory is None:
        return _total_memory(device) // _SHARE
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f"memory is {memory!r}; pass bytes (an int), a string as '2GB', or None")
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(?:i?B)?\s*", str(memory), re.IGNORECASE)
    limit = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if limit < 1:
        raise ValueError(
            f"memory is {memory!r}; pass a positive number of bytes, or a string as '2GB' or '512MB'"
        )
    return limit


def in_words(size: int) -> str:
    """Return ``size`` bytes as a string that :func:`memory_limit` reads as no less: "12.4MB"."""
    unit = next((name for name in "TGM" if size >= _UNITS[name]), "K")
    return f"{-(-10 * size // _UNITS[unit]) / 10:g}{unit}B"


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return _UNKNOWN
    group = Path("/sys/fs/cgroup/memory.max")  # what a container may take
    text = group.read_text().strip() if group.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total
