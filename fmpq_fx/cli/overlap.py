"""Many images, one after the other: while one is coded, the next is read and the last is written."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TypeVar

from fmpq_fx.errors import FmpqError
from fmpq_fx.progress import reported

S = TypeVar("S")
T = TypeVar("T")

# What one image may fail with, while others do not: damage, a size, the memory that it takes.
_FAILURES = (FmpqError, ValueError, OSError, MemoryError, RuntimeError)


def each(
    jobs: Mapping[Path, Path],
    verb: str,
    read: Callable[[Path], S],
    code: Callable[[S], T],
    write: Callable[[T, Path, Event], None],
) -> list[str]:
    """Read each source, code it and write the result, in the order of ``jobs``; return what went wrong, by source.

    One thread reads, one writes, and this one codes::

        read      1   2   3   4
        code          1   2   3   4
        write             1   2   3   4

    So three images are in memory at most.

    Args:
        jobs: the file to write for each source.
        verb: what is done, to tell how far it has come.
        read: returns what is in a source. Where this or ``code`` fails, the others are done.
        code: returns the result for what was read.
        write: writes a result into a file, unless the event is set meanwhile, which is an interruption.

    Raises:
        OSError: a file cannot be written. The others could not either, so they are not tried.
    """
    failures: list[str] = []
    coming: Future[S] | None = None
    writing: Future[None] | None = None
    stop = Event()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        begin = (reader.submit(read, source) for source in jobs)  # one with each next()
        try:
            coming = next(begin, None)
            for source, out in reported(jobs.items(), verb, "image"):
                assert coming is not None
                ready, coming = coming, next(begin, None)
                failure = ""
                try:
                    coded = code(ready.result())
                except _FAILURES as error:
                    failure = str(error) if str(source) in str(error) else f"{source}: {error}"
                if (
                    writing is not None
                ):  # before this failure is told: it would not have come so far otherwise
                    writing.result()
                if failure:
                    failures.append(failure)
                else:
                    writing = writer.submit(write, coded, out, stop)
            if writing is not None:
                writing.result()
        except OSError:
            for failure in failures:
                print(f"fmpq-fx: error: {failure}", file=sys.stderr)
            raise
        finally:
            stop.set()
            if coming is not None:
                coming.cancel()
    return failures
