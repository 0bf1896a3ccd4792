"""Memory of freed tensors, kept for the next ones."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h; the defaults are those of its manual, the trim threshold the most that it adapts to.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 64 * 2**20, 65536

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
