"""Print without ever failing a job: text that cannot be printed is replaced, or left out."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


@contextmanager
def forgiving() -> Iterator[None]:
    """Within the block, printing raises no error, neither for this program's lines nor for those of libraries.

    A character that the encoding of a stream lacks is printed as "?". If the reader closed its pipe, nothing more is
    printed. A warning for the user is printed as a sentence, without the line of the program that gave it.
    """
    with ExitStack() as stack:
        stack.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        warnings.formatwarning = _sentence(warnings.formatwarning)
        for redirect, stream in ((redirect_stderr, sys.stderr), (redirect_stdout, sys.stdout)):
            if stream is not None:  # None: closed before the program began
                forgiven = _Forgiving(stream)
                stack.enter_context(redirect(forgiven))
                stack.callback(forgiven.flush)
        yield


def _sentence(otherwise: Callable[..., str]) -> Callable[..., str]:
    """Return a formatter that makes a sentence of a warning for users, and passes others to ``otherwise``."""

    def write(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if issubclass(category, UserWarning):
            return f"fmpq-fx: warning: {message}\n"
        return otherwise(message, category, *where, **line)

    return write


class _Forgiving:
    """A text stream that writes to another one, and raises no error."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Drop the text that is still to be printed; otherwise Python would complain of it at its end."""
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if not isinstance(error, BrokenPipeError) and self is not sys.stderr:
            print(f"fmpq-fx: note: cannot print: {error.strerror}", file=sys.stderr)
