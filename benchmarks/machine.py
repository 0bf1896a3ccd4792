"""The machine that figures are measured on: its processor, and the memory of a process there."""

import multiprocessing
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_fresh_process(job: Callable[..., None], *arguments: Any) -> Any:
    """Return what ``job(*arguments, results)`` puts into ``results``, a queue, in a process of its own."""
    context = multiprocessing.get_context("spawn")  # a fork has the memory, but not the threads of this one
    results = context.SimpleQueue()
    process = context.Process(target=job, args=(*arguments, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process that measures ended with {process.exitcode}")
    return results.get()


def resident(name: str) -> int:
    """Return the resident bytes of this process, as they are ("VmRSS") or at their peak ("VmHWM"); Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def forget_peak() -> None:
    """Let the peak of :func:`resident` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
