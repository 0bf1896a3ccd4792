"""The values of the options named ``memory``: how many bytes may be used."""

import math
import os
import re
from pathlib import Path

import torch

_CPU = torch.device("cpu")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
_UNKNOWN = 8 * 2**30  # bytes that are assumed if the system does not tell its memory


def bytes_of(memory: int | str | None, device: torch.device = _CPU) -> int:
    """Return ``memory`` in bytes.

    Args:
        memory: bytes; or a text like "500 MB", "2GB" (10^9) or "1.5 GiB" (2^30); or None for a quarter of all memory
            of the machine, of the container that this runs in, or of the GPU.
        device: the device whose memory is meant.

    Raises:
        TypeError: ``memory`` is of another type.
        ValueError: ``memory`` is not positive, or a text of another form.
    """
    if memory is None:
        return _physical(device) // 4
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f'memory is a {type(memory).__name__}; pass bytes, a text like "2GB", or None')
    if isinstance(memory, str):
        number = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", memory.lower())
        if number is None or (number[3] and not number[2]):
            raise ValueError(f'memory is {memory!r}; pass bytes, or a text like "500 MB", "2GB" or "1.5 GiB"')
        found = int(float(number[1]) * (_BINARY if number[3] else _UNITS)[number[2]])
    else:
        found = memory
    if found <= 0:
        raise ValueError(f"memory is {memory!r}; pass more than nothing")
    return found


def spelled(size: int) -> str:
    """Return ``size`` in bytes as a text, rounded up: "1.5 GB"."""
    for power, unit in ((10**9, "GB"), (10**6, "MB")):
        if size >= power:
            return f"{math.ceil(10 * size / power) / 10:.1f} {unit}"
    return f"{math.ceil(size / 1000)} kB"


def _physical(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN
    for path in map(Path, _LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            sizes.append(int(text))
    return min(sizes)
