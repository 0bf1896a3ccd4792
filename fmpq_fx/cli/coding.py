"""The commands that code images: encode, decode, evaluate."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor, nn

from fmpq_fx import ranks
from fmpq_fx.cli.arguments import (
    CODED,
    MODEL,
    OPTION_OF,
    add_backend,
    add_class,
    add_device,
    add_memory,
    add_model,
    add_robust,
    made_by,
    refuse_metric_of_own,
    refuse_unused,
    set_threads,
)
from fmpq_fx.cli.outputs import GRAPHS, IMAGE_MARK, RESULTS, Output, declare
from fmpq_fx.cli.overlap import each
from fmpq_fx.coding import fmi
from fmpq_fx.coding.evaluation import evaluate
from fmpq_fx.errors import FmpqError
from fmpq_fx.formats.model_file import load_codec
from fmpq_fx.formats.state import load_state
from fmpq_fx.images import reading
from fmpq_fx.models.zoo import load_model
from fmpq_fx.storage.files import check_folder, replacing, write_text


def add_evaluate(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    add_model(command, "a STATE or .fmpq file, ")
    add_class(command)
    command.add_argument("images", type=Path, metavar="DIR", help="folder of images, of any size")
    command.add_argument("--json", type=Path, metavar="F", help="write the results per image and their means")
    add_backend(command)
    add_device(command)
    add_memory(command)
    add_robust(command)
    declare(command, reads=["model", "checkpoint", "images"], writes=[("json", RESULTS), ("graphs", GRAPHS)])
    command.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    set_threads(args)
    model = _model(args).to(ranks.own_device(args.device))
    results = evaluate(model, args.images, robust=args.robust, memory=args.memory)
    if args.json is not None:
        write_text(args.json, results.to_json())
    print(results)
    if args.json is not None:
        print(f"results: {args.json}")
    _raise_any(results.skipped, len(results.images) + len(results.skipped), "evaluated")


def _model(args: argparse.Namespace) -> nn.Module:
    """Return the model, the graph or the codec that the command names."""
    if args.backend != "torch" and Path(args.model).suffix != MODEL:
        raise ValueError(f"--backend {args.backend} runs model files (*{MODEL}); got {args.model}")
    if Path(args.model).suffix != MODEL:
        refuse_unused(args, "cls", "graphs", *OPTION_OF, because=f"that is for model files (*{MODEL})")
    if not Path(args.model).is_file():
        refuse_metric_of_own(args)
        return load_model(args.model, quality=args.quality, metric=args.metric, checkpoint=args.checkpoint)
    if (args.quality, args.metric, args.checkpoint) != (None, None, None):
        raise ValueError(
            f"{args.model} is a file, which has its weights; leave --quality, --metric and --checkpoint out"
        )
    if Path(args.model).suffix != MODEL:
        return load_state(args.model)
    return _codec(args)


def _codec(args: argparse.Namespace) -> nn.Module:
    """Return the codec in the model file that the command names, run by its backend, or on its device."""
    for option, backend in OPTION_OF.items():
        if args.backend != backend:
            refuse_unused(args, option, because=f"that is for --backend {backend}")
    if args.backend == "torch":
        refuse_unused(args, "graphs", because="--backend torch runs no exported graphs")
        return load_codec(args.model, model=made_by(args)).to(ranks.own_device(args.device))
    if args.device != "cpu":
        raise ValueError(f"--backend {args.backend} runs on the CPU; leave --device {args.device} out")
    options: dict[str, Any] = {"graphs": args.graphs, "threads": args.threads}
    options |= {option: getattr(args, option) for option in OPTION_OF if getattr(args, option) is not None}
    return load_codec(args.model, model=made_by(args), backend=args.backend, **options)


def add_encode(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``encode``."""
    source, out = "an image, or a folder of them", f"the file ({CODED}), or a folder for them"
    _add_coding(command, source, out, fmi.MAGIC, _to_encode)
    add_robust(command)
    command.add_argument(
        "--margin",
        type=float,
        metavar="M",
        help="guard against scales that differ by this fraction; default: measured",
    )
    command.set_defaults(run=_encode)


def add_decode(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``decode``."""
    source = f"a {CODED} file, or a folder of them"
    out = "the image (.png and others), or a folder for them, as PNG"
    _add_coding(command, source, out, IMAGE_MARK, _to_decode)
    command.set_defaults(run=_decode)


def _add_coding(
    command: argparse.ArgumentParser,
    source: str,
    out: str,
    mark: bytes,
    jobs: Callable[[argparse.Namespace], Mapping[Path, Path]],
) -> None:
    add = command.add_argument
    add("source", type=Path, metavar="SOURCE", help=source)
    add("-m", "--model", required=True, metavar="F", help="the model file (.fmpq)")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help=out)
    add_class(command)
    add_backend(command)
    add_device(command)
    add_memory(command)
    output = Output(mark, check=lambda path: None, files=lambda args, path: jobs(args).values())
    declare(command, reads=["source", "model"], writes=[("out", output), ("graphs", GRAPHS)])


def _encode(args: argparse.Namespace) -> None:
    set_threads(args)
    jobs, codec = _to_encode(args), _codec(args)
    _make_folder(args)
    pixels: list[int] = []
    sizes: list[int] = []

    def encoded(image: Tensor) -> bytes:
        data = fmi.encode(codec, image, robust=args.robust, margin=args.margin, memory=args.memory)
        pixels.append(image[0].numel())
        sizes.append(len(data))
        return data

    start = time.monotonic()
    failures = each(jobs, "encode", reading.read, encoded, _write_coded)
    if sizes:
        rate = f"{8 * sum(sizes) / sum(pixels):.4f} bits per pixel"
        _print_done(args, len(sizes), start, f"{sum(sizes):,} bytes", rate)
    _raise_any(failures, len(jobs), "encoded")


def _write_coded(data: bytes, out: Path, stop: Event) -> None:
    with replacing(out, stop) as file:
        file.write(data)


def _decode(args: argparse.Namespace) -> None:
    set_threads(args)
    jobs, codec = _to_decode(args), _codec(args)
    _make_folder(args)

    def decoded(data: bytes) -> Tensor:
        return fmi.decode(codec, data, memory=args.memory)

    start = time.monotonic()
    failures = each(jobs, "decode", Path.read_bytes, decoded, reading.write)
    if len(jobs) > len(failures):
        _print_done(args, len(jobs) - len(failures), start)
        if not args.source.is_dir() and args.out.suffix.lower() in reading.LOSSY:
            print(
                f"fmpq-fx: note: {args.out.suffix} loses detail; .png keeps what was decoded", file=sys.stderr
            )
    _raise_any(failures, len(jobs), "decoded")


def _make_folder(args: argparse.Namespace) -> None:
    if args.source.is_dir():
        args.out.mkdir(parents=True, exist_ok=True)


def _print_done(args: argparse.Namespace, count: int, start: float, *facts: str) -> None:
    """Print the number of images, ``facts`` about them, the speed since ``start`` (for folders), and the output."""
    if args.source.is_dir():
        facts = *facts, f"{count / (time.monotonic() - start):.3g} images per second"
    parts = [f"{count} image{'s' * (count != 1)}", ", ".join(facts), str(args.out)]
    print(": ".join(filter(None, parts)))


def _raise_any(failures: Iterable[str], count: int, verb: str) -> None:
    """Raise an error that lists the ``failures`` among ``count`` images, if there are any."""
    failures = list(failures)
    if count == 1 and failures:
        raise FmpqError(failures[0])
    if failures:
        raise FmpqError("\n  ".join([f"{len(failures)} of {count} images could not be {verb}:", *failures]))


def _to_encode(args: argparse.Namespace) -> dict[Path, Path]:
    return _jobs(args, reading.find, CODED, _check_coded)


def _check_coded(path: Path) -> None:
    check_folder(path)
    # A device or a pipe has its own name, and /dev/stdout is a link to the file that the shell opened.
    special = path.exists() and (path.is_symlink() or not path.is_file())
    if path.suffix != CODED and not special:
        raise ValueError(f"a coded image is named *{CODED}; got {path}")


def _to_decode(args: argparse.Namespace) -> dict[Path, Path]:
    return _jobs(args, _coded_files, ".png", _check_image)


def _check_image(path: Path) -> None:
    check_folder(reading.check_writable(path))


def _coded_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix == CODED and p.name[0] != "." and p.is_file())
    if not found:
        raise FmpqError(f"there are no {CODED} files in {folder}")
    return found


def _jobs(
    args: argparse.Namespace,
    found: Callable[[Path], list[Path]],
    suffix: str,
    check: Callable[[Path], object],
) -> dict[Path, Path]:
    """Return the file to write for each source, after checking that it can be written; nothing is created.

    Raises:
        FmpqError: there is no source, or two of them would be written to one file.
        OSError: the output is a folder and must be a file, or the other way round, or its folder does not exist.
    """
    if not args.source.exists():
        raise FmpqError(f"there is no file and no folder {args.source}")
    if not args.source.is_dir():
        check(args.out)
        return {args.source: args.out}
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(
            f"{args.source} is a folder, and {args.out} is a file; name a folder for the files"
        )
    jobs = {source: args.out / (source.stem + suffix) for source in found(args.source)}
    if len(set(jobs.values())) < len(jobs):
        twice = next(out for out in jobs.values() if list(jobs.values()).count(out) > 1)
        names = " and ".join(source.name for source, out in jobs.items() if out == twice)
        raise FmpqError(f"{names} would both be written to {twice}; rename one")
    return jobs
