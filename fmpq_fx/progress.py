"""Progress of long work: a bar on a terminal, and elsewhere a line for each tenth of the work."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from time import monotonic
from types import TracebackType
from typing import Generic, TypeVar

from tqdm import tqdm

from fmpq_fx import ranks

T = TypeVar("T")

QUIET = 5
"""Seconds before the first line; work that is over by then prints nothing."""


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
    """Return ``items`` as an iterable that prints on stderr how far the loop over it has come.

    Of several ranks only the first prints. It is a context manager too: code that has no loop to wrap calls
    ``update()`` for each piece of work. ``set_postfix(figures)`` sets figures to show.

    Args:
        items: the items of the loop; ``range(total)`` where ``update()`` is called instead.
        what: the name of the work, "weight scales" for instance.
        unit: the name of one item.
        total: the number of items; None asks ``items``.
        done: the number of items that were done before.
        every: the number of items from one line to the next; None is a tenth of ``total``.
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
        """Count ``count`` more items as done, and print a line if one is due."""
        before = self._part()
        self.done += count
        # A single item prints nothing: its line would come when the work is over.
        if self.total > 1 and (self._part() > before or self.done == self.total):
            spent = monotonic() - self.start
            if spent >= QUIET:
                self._print(spent)

    def _part(self) -> int:
        """Return how many lines were due so far."""
        return 10 * self.done // max(1, self.total) if self.every is None else self.done // self.every

    def set_postfix(self, figures: Mapping[str, str], refresh: bool = True) -> None:
        """Show ``figures`` on the next line."""
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
