"""What a command reads and writes: declared beside its arguments, and checked before any work.

What would be lost is not written over: a file that the command reads, by whatever name or link, and a file that this
program did not write. Earlier results of a command make way for new ones, as they do when it is repeated.
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

    mark: bytes | None  # that the first or last bytes have of each that we wrote; None where they have none
    check: Callable[[Path], object] = check_folder  # raises an error where a path is impossible
    # The files that the value of the argument leads to; the argument itself by default.
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
    """Return where ``finetune`` keeps its training until the state ``out`` is written."""
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
            help="write over inputs and files that are there as well"
            + ("; what fmpq-fx wrote before is replaced without this" if known else ""),
        )
    command.set_defaults(reads=tuple(reads), writes=tuple(writes))


def check_outputs(args: argparse.Namespace) -> None:
    """Check that nothing is lost by writing what the command of ``args`` writes.

    Raises:
        ValueError: an output is an input, another output, or a file that is there and not ours.
        OSError: an output is in no folder, or is one.
    """
    given = [(getattr(args, name), output) for name, output in args.writes]
    outputs = [
        (path, output) for value, output in given if value is not None for path in output.files(args, value)
    ]
    for path, output in outputs:
        output.check(path)
    names: dict[object, Path] = {}
    for path, _ in outputs:
        if not path.exists() or path.is_file():  # a device takes more than one
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
    """Return what is equal for two names of one file."""
    if path.exists():
        found = path.stat()
        return found.st_dev, found.st_ino
    return os.path.realpath(path)


def _inputs(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the files that the command is to read, those of folders among them."""
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
