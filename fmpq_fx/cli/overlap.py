"""Code many images: while one is coded, the next is read and the last is written."""

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


# Errors of a single image, after which others can still be coded: damage, its size, its memory.
_FAILURES = (FmpqError, ValueError, OSError, MemoryError, RuntimeError)


def each(
    jobs: Mapping[Path, Path],
    verb: str,
    read: Callable[[Path], S],
    code: Callable[[S], T],
    write: Callable[[T, Path, Event], None],
) -> list[str]:
    """Read each source, code it and write the result, in the order of ``jobs``; return the errors of failed sources.

    One thread reads, one writes, and this one codes::

        read      1   2   3   4
        code          1   2   3   4
        write             1   2   3   4

    So at most three images are in memory.

    Args:
        jobs: the file to write for each source.
        verb: the name of the work, for the progress bar.
        read: returns the content of a source. If this or ``code`` fails, the other sources are still done.
        code: returns the result for a content.
        write: writes a result into a file, and stops if the event is set meanwhile (an interruption).

    Raises:
        OSError: a file cannot be written. Others could not be either, so they are not tried.
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
                if writing is not None:  # an error of writing comes first: it ends the loop
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
