"""Write files so that an interruption never leaves half a file under the final name, and dataclasses as JSON."""

import io
import json
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, TypeVar

from fmpq_fx.errors import FmpqError

WRITER = "fmpq-fx"
"""The name of the program in pictures, if their format has a place for it."""

T = TypeVar("T", bound="JsonFile")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Check that the folder of the file ``path`` exists, and that ``path`` is no folder.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: ``path`` is a folder.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    folder = followed(Path(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; create it")


class _Stoppable(io.BufferedWriter):
    """A file that cannot be written into any more once ``stop`` is set."""

    stop: Event | None = None

    def write(self, data: Any) -> int:
        """Write ``data``, or stop."""
        if self.stop is not None and self.stop.is_set():
            raise KeyboardInterrupt
        return super().write(data)


@contextmanager
def replacing(path: str | os.PathLike[str], stop: Event | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write into that replaces ``path`` when the block ends without an error.

    On any error, a full disk or an interruption included, ``path`` stays as it was and nothing else is left. A link
    is followed: the file that it points to is replaced. A device, a pipe or a socket is not replaced, but written into
    at the end of the block. A new file has the usual permissions of new files of the process.

    Args:
        path: the file.
        stop: once it is set, the next write in the block raises KeyboardInterrupt; for threads, since Ctrl-C only
            interrupts the main thread.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: writing failed, in the block or after it; the message says why ``path`` could not be written.
    """
    final = Path(path)
    check_folder(final)
    with writing(final):
        if final.exists() and not final.is_file():
            with tempfile.TemporaryFile() as temporary:
                yield temporary
                temporary.seek(0)
                with final.open("wb") as special:
                    shutil.copyfileobj(temporary, special)
            return
        target = followed(final)
        beside = target.with_name(f".fmpq-fx-{secrets.token_hex(8)}")
        try:
            with _Stoppable(io.FileIO(beside, "xb")) as file:
                file.stop = stop
                yield file
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name ``path`` and the reason in the error if the block fails because of the disk.

    Writers of other packages raise their own errors when a write fails; the system's error is their cause.

    Raises:
        OSError: the system's error, of its type and with its ``errno``.
    """
    try:
        yield
    except FmpqError:
        raise
    except Exception as error:
        refused: BaseException | None = error
        while refused is not None and not isinstance(refused, OSError):
            refused = refused.__cause__ or refused.__context__
        if refused is None:
            raise
        told = type(refused)(f"cannot write {path}: {refused.strerror or refused}")
        told.errno = refused.errno
        raise told from error


def followed(path: Path) -> Path:
    """Return the target of the link ``path``, whether or not it exists; ``path`` itself if it is no link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, all of it or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


class JsonFile(ABC):
    """A dataclass that saves to and loads from a JSON file."""

    def to_json(self) -> str:
        """Return the object as a JSON text; its inverse is :meth:`from_json`."""
        return json.dumps({"format": type(self).__name__, **asdict(self)}, indent=1)  # type: ignore[call-overload]

    @classmethod
    @abstractmethod
    def _from_fields(cls: type[T], fields: dict[str, Any]) -> T:
        """Rebuild the object from the fields of its JSON."""

    @classmethod
    def from_json(cls: type[T], text: str) -> T:
        """Rebuild the object from the text that :meth:`to_json` returned.

        Raises:
            FmpqError: ``text`` is no JSON, or not that of an object of this class.
        """
        try:
            fields = json.loads(text)
            if fields.pop("format") != cls.__name__:
                raise ValueError("another format")
            return cls._from_fields(fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FmpqError(
                f"this is not the JSON of a {cls.__name__} ({type(error).__name__}: {error}); "
                f"pass a file that {cls.__name__}.save() wrote"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to ``path``."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """Rebuild the object from the file that :meth:`save` wrote to ``path``.

        Raises:
            FmpqError: there is no such file, or it holds no object of this class.
        """
        file = Path(path)
        if not file.is_file():
            raise FmpqError(f"there is no file {file}; {cls.__name__}.save() writes one")
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (FmpqError, UnicodeDecodeError) as error:
            raise FmpqError(f"{file}: {error}") from error
