"""Writing files so that an interruption never leaves a half-written one under the final name."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(path: str | os.PathLike[str]) -> None:
    """Check that the folder that ``path`` is to be written in exists.

    Raises:
        FileNotFoundError: it does not.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; create it")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The temporary name keeps the suffix, so that writers that choose a format by it do so. On any error,
    a full disk or an interruption included, the temporary file is removed and ``path`` stays as it was.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    final = Path(path)
    check_folder(final)
    handle, name = tempfile.mkstemp(suffix=final.suffix, prefix=f".{final.stem}-", dir=final.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner may read; give it what a plain open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
