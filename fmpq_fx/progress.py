"""How far long work has come: a bar on a terminal, and a line for each tenth of the work where there is none."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from time import monotonic
from types import TracebackType
from typing import Generic, TypeVar

from tqdm import tqdm

from fmpq_fx import ranks

T = TypeVar("T")

QUIET = 5
"""Seconds that work goes on before the first line; of what is over by then, nobody needs to be told."""


def reported(
    items: Iterable[T],
    what: str,
    unit: str,
    *,
    total: int | None = None,
    done: int = 0,
    every: int | None = None,
    leave: bool = False,
    show: bool | None = None,
) -> "tqdm[T] | Lines[T]":
    """Return ``items`` as an iterable that tells on stderr how far the loop over it has come.

    Of several ranks the first one tells. It is a context manager too: what has no loop of its own to wrap calls
    ``update()`` for each piece of work, and ``set_postfix(figures)`` gives figures to show.

    Args:
        items: what is iterated over; ``range(total)`` where ``update()`` is called instead.
        what: the work, as "weight scales".
        unit: what is counted, in the singular.
        total: how many there are; None asks ``items``.
        done: how many of them were done before.
        every: how many there are from one line to the next; None is a tenth of ``total``.
        leave: whether a bar stays when the work is done.
        show: True is a bar anywhere, False nothing, None a bar on a terminal and lines elsewhere, from :data:`QUIET`
            seconds on.
    """
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    if show is None and ranks.is_first() and not sys.stderr.isatty():
        return Lines(items, what, unit, total, done, every)
    hide = show is False or not ranks.is_first()
    return tqdm(items, what, total, initial=done, unit=unit, disable=hide, leave=leave)


class Lines(Generic[T]):
    """Prints a line to stderr whenever a part of the work is done; see :func:`reported`."""

    def __init__(
        self, items: Iterable[T], what: str, unit: str, total: int, done: int = 0, every: int | None = None
    ):
        self.items, self.what, self.unit, self.total, self.done = items, what, unit, total, done
        self.every = every
        self.figures: Mapping[str, str] = {}
        self.first, self.start = done, monotonic()

    def __iter__(self) -> Iterator[T]:
        for item in self.items:
            yield item
            self.update()

    def __enter__(self) -> "Lines[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Count ``count`` more as done, and print a line where one is due."""
        before = self._part()
        self.done += count
        # A single piece of work has nothing to tell before it is over.
        if self.total > 1 and (self._part() > before or self.done == self.total):
            spent = monotonic() - self.start
            if spent >= QUIET:
                self._print(spent)

    def _part(self) -> int:
        """Return the number of the line that was due last."""
        return 10 * self.done // max(1, self.total) if self.every is None else self.done // self.every

    def set_postfix(self, figures: Mapping[str, str], refresh: bool = True) -> None:
        """Take ``figures`` for the next line."""
        self.figures = figures

    def _print(self, spent: float) -> None:
        left = spent / (self.done - self.first) * (self.total - self.done)
        times = f"{tqdm.format_interval(spent)}, {tqdm.format_interval(left)} left"
        figures = "".join(f", {name} {value}" for name, value in self.figures.items())
        text = f"{self.what}: {self.done} of {self.total} {self.unit}s, {times}{figures}"
        try:
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads any more, which is no reason to stop the work
            self.total = 0
