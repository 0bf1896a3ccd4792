"""Keep the memory of freed tensors for the next tensors."""

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The numbers of glibc's malloc.h, and the values that its own adaptation can grow to in any process.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_MMAP_THRESHOLD, _MOST_TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20  # bytes
_NEVER = 2**31 - 1

_blocks = 0  # blocks that are open now, in all threads
_COUNTING = threading.Lock()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, glibc's malloc does not return freed memory to the kernel.

    Otherwise every run would take new pages for its activations, and the kernel zeroes each page: a tenth to a quarter
    of the time of an evaluation. At the end of the outermost block the memory is returned.

    glibc adapts two thresholds to a program: tensors above the first get pages of their own, and free memory above the
    second is returned. Setting either stops the adapting for the rest of the process. So both are left at the highest
    values that glibc adapts to: the caller's tensors are then allocated as fast as in any process that has used large
    ones. With another C library nothing happens.
    """
    global _blocks
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    with _COUNTING:
        _blocks += 1
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        with _COUNTING:
            _blocks -= 1
            if not _blocks:
                libc.mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM_THRESHOLD)
                libc.malloc_trim(0)
