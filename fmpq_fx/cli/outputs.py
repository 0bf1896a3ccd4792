"""The inputs and outputs of commands: declared beside the arguments, and checked before any work.

Two kinds of files are not written over: inputs of the command, under any name or link, and files that this program did
not write. Earlier results of a command are replaced by new ones.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmpq_fx.formats import state
from fmpq_fx.report.picture import check_plot_path
from fmpq_fx.storage import container
from fmpq_fx.storage.files import WRITER, check_folder
from fmpq_fx.training import run

IMAGE_MARK = WRITER.encode()  # among the metadata of pictures
MODEL_MARK = container.FORMAT.encode()

_ENDS = 4096  # bytes at the beginning and at the end of a file, where a mark is looked for


@dataclass(frozen=True)
class Output:
    """A kind of file that commands write."""

    # Bytes that the beginning or the end of each file of this kind has; None: there is no such mark.
    mark: bytes | None
    check: Callable[[Path], object] = check_folder  # raises an error for an impossible path
    # The files that are written for the value of the argument; by default that path itself.
    files: Callable[[argparse.Namespace, Path], Iterable[Path]] = lambda args, path: [path]


def _json(name: str) -> Output:
    return Output(f'"format": "{name}"'.encode())


PLAN, TABLE, HISTORY = _json("Plan"), _json("Sensitivity"), _json("History")
RESULTS = Output(b'"estimated_bpp"')
STATE = Output(state.FORMAT.encode())
TRAINING = Output(run.FORMAT.encode(), files=lambda args, path: [training_checkpoint(path)])
CHECKPOINT = Output(None)
PICTURE = Output(IMAGE_MARK, check_plot_path)
GRAPHS = Output(None, files=lambda args, path: [])  # export_onnx() replaces a folder of graphs and no other


def training_checkpoint(out: Path) -> Path:
    """Return the path of the training checkpoint of ``finetune``, which exists until the state ``out`` is written."""
    return out.with_name(out.name + ".training")


def declare(
    command: argparse.ArgumentParser, *, reads: Sequence[str], writes: Sequence[tuple[str, Output]] = ()
) -> None:
    """Note which arguments of ``command`` name files or folders that it ``reads``, and which it ``writes``."""
    if any(output is not GRAPHS for _, output in writes):
        known = all(output is not CHECKPOINT for _, output in writes)
        command.add_argument(
            "--overwrite",
            action="store_true",
            help="write over inputs and existing files as well"
            + ("; files that fmpq-fx wrote are replaced without this" if known else ""),
        )
    command.set_defaults(reads=tuple(reads), writes=tuple(writes))


def check_outputs(args: argparse.Namespace) -> None:
    """Check that the outputs of the command of ``args`` overwrite nothing of value.

    Raises:
        ValueError: an output is an input, another output, or an existing file that this program did not write.
        OSError: the folder of an output does not exist, or an output is a folder.
    """
    given = [(getattr(args, name), output) for name, output in args.writes]
    outputs = [
        (path, output) for value, output in given if value is not None for path in output.files(args, value)
    ]
    for path, output in outputs:
        output.check(path)
    names: dict[object, Path] = {}
    for path, _ in outputs:
        if not path.exists() or path.is_file():  # a device takes several outputs
            first = names.setdefault(_identity(path), path)
            if first is not path:
                raise ValueError(f"{first} and {path} would be written to one file; name two")
    there = [(path, output) for path, output in outputs if path.is_file()]
    if not there or args.overwrite:
        return
    inputs = {_identity(path): path for path in _inputs(args)}
    for path, output in there:
        remedy = "name another file, or pass --overwrite"
        if (read := inputs.get(_identity(path))) is not None:
            raise ValueError(f"{path} would be written over {read}, which is an input; {remedy}")
        if path.stat().st_size and not _is_ours(path, output.mark):
            raise ValueError(f"{path} is there already, and not known to be written by fmpq-fx; {remedy}")


def _identity(path: Path) -> object:
    """Return a value that is equal for two names of one file."""
    if path.exists():
        found = path.stat()
        return found.st_dev, found.st_ino
    return os.path.realpath(path)


def _inputs(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the files that the command reads, and the files in folders that it reads."""
    for name in args.reads:
        path = Path(getattr(args, name) or os.devnull)
        yield from filter(Path.is_file, path.iterdir() if path.is_dir() else [path])


def _is_ours(path: Path, mark: bytes | None) -> bool:
    if mark is None:
        return False
    with path.open("rb") as file:
        first = file.read(_ENDS)
        file.seek(max(0, path.stat().st_size - _ENDS))
        return mark in first or mark in file.read()
