"""The commands that deal with files of models and images: export, inspect, evaluate, encode, decode."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fmpq_fx import ranks
from fmpq_fx.coding import fmi
from fmpq_fx.coding.codec import export_checkpoint
from fmpq_fx.coding.evaluation import evaluate
from fmpq_fx.errors import FmpqError
from fmpq_fx.formats.model_file import load, load_codec, save
from fmpq_fx.formats.state import load_state
from fmpq_fx.images import reading
from fmpq_fx.models.zoo import load_model, model_factory
from fmpq_fx.onnx.codec import BACKENDS
from fmpq_fx.onnx.export import export_onnx
from fmpq_fx.report.file_bytes import file_report
from fmpq_fx.storage.files import check_folder, replacing, write_text

CODED = ".fmi"
MODEL = ".fmpq"


def add_model(command: argparse.ArgumentParser, others: str = "") -> None:
    """Add the arguments that name a model."""
    add = command.add_argument
    add(
        "model",
        metavar="MODEL",
        help=f"{others}'sample', a name of CompressAI's zoo, or package.module:callable",
    )
    add("--quality", type=int, metavar="Q", help="of CompressAI's pretrained weights, 1 to 8")
    add("--checkpoint", type=Path, metavar="F", help="trained weights of the model")


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the argument that says where to compute."""
    command.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda",
        help="what to compute on; default cpu; cuda:1 is the second GPU",
    )


def add_evaluate(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    add_model(command, "a STATE or .fmpq file, ")
    _add_class(command)
    command.add_argument("images", type=Path, metavar="DIR", help="folder of images, of any size")
    command.add_argument("--json", type=Path, metavar="F", help="write the results per image and their means")
    add_backend(command)
    add_device(command)
    _add_memory(command)
    command.set_defaults(run=_evaluate)


def add_backend(command: argparse.ArgumentParser) -> None:
    """Add the arguments that say what runs the transforms of a model file."""
    add = command.add_argument
    add("--backend", choices=BACKENDS, default="torch", help="what runs the transforms of a .fmpq file")
    add("--graphs", type=Path, metavar="DIR", help="what 'export onnx' wrote, or where to; default: not kept")
    add("--threads", type=int, metavar="N", help="of torch and ONNX Runtime; default: their own choice")


def _evaluate(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_folder(args.json)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = _model(args).to(ranks.own_device(args.device))
    results = evaluate(model, args.images, memory=args.memory)
    print(results)
    if args.json is not None:
        write_text(args.json, results.to_json())
        print(f"results: {args.json}")


def _model(args: argparse.Namespace) -> nn.Module:
    """Return the model or what is in the file that the command names."""
    if args.backend != "torch" and Path(args.model).suffix != MODEL:
        raise ValueError(f"--backend {args.backend} runs model files (*{MODEL}); got {args.model}")
    if args.backend != "torch" and args.device != "cpu":
        raise ValueError(f"--backend {args.backend} runs on the CPU; leave --device {args.device} out")
    if not Path(args.model).is_file():
        return load_model(args.model, quality=args.quality, checkpoint=args.checkpoint)
    if args.quality is not None or args.checkpoint is not None:
        raise ValueError(
            f"{args.model} is a file, which has its weights; leave --quality and --checkpoint out"
        )
    return load_state(args.model) if Path(args.model).suffix != MODEL else _codec(args.model, args)


def _add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help="that coding may take, as 2GB or 500MB, by tiles if need be; default: a quarter of the machine's",
    )


def _add_class(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--class",
        dest="cls",
        metavar="package.module:callable",
        help="what makes the model of a .fmpq file, where it is not of CompressAI's zoo",
    )


def _codec(path: str, args: argparse.Namespace) -> nn.Module:
    options: dict[str, Any] = {}
    if getattr(args, "backend", "torch") != "torch":
        options = {"backend": args.backend, "graphs": args.graphs, "threads": args.threads}
    return load_codec(path, model=_made_by(args), **options)


def _made_by(args: argparse.Namespace) -> Callable[[], nn.Module] | None:
    return None if args.cls is None else model_factory(args.cls)


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the kinds of ``export`` and their arguments."""
    kinds = command.add_subparsers(required=True, metavar="KIND")
    checkpoint = kinds.add_parser(
        "checkpoint", help="dequantized weights, which a stock CompressAI loads; activations are float there"
    )
    model = kinds.add_parser("model", help="a model file at its real size, to encode and decode with")
    for kind, form, run in (
        (checkpoint, "the checkpoint (.pth.tar)", _export_checkpoint),
        (model, "the model file (.fmpq)", _export_model),
    ):
        kind.add_argument("state", type=Path, metavar="STATE", help="what 'prepare' or 'finetune' wrote")
        kind.add_argument("--out", type=Path, required=True, metavar="F", help=form)
        kind.set_defaults(run=run)
    onnx = kinds.add_parser(
        "onnx", help="ONNX graphs with integer convolutions, one for each part of the model"
    )
    add = onnx.add_argument
    add("state", type=Path, metavar="STATE", help="what 'prepare' or 'finetune' wrote, or a .fmpq file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the graphs and their manifest")
    _add_class(onnx)
    onnx.set_defaults(run=_export_onnx)


def _export_onnx(args: argparse.Namespace) -> None:
    gm = load(args.state, model=_made_by(args)) if args.state.suffix == MODEL else load_state(args.state)
    print(export_onnx(gm, args.out))
    print(f"graphs: {args.out}")


def _export_checkpoint(args: argparse.Namespace) -> None:
    check_folder(args.out)
    export_checkpoint(load_state(args.state), args.out)
    print(f"checkpoint: {args.out}")


def _export_model(args: argparse.Namespace) -> None:
    check_folder(args.out)
    if args.out.suffix != MODEL:
        raise ValueError(f"a model file is named *{MODEL}; got {args.out}")
    save(load_state(args.state), args.out)
    print(f"model: {args.out}, {args.out.stat().st_size:,} bytes; 'fmpq-fx inspect' says where they are")


def add_inspect(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    command.add_argument("file", type=Path, metavar="FILE", help="a model file (.fmpq)")
    command.set_defaults(run=lambda args: print(file_report(args.file)))


def add_encode(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``encode``."""
    _add_coding(
        command, "an image, or a folder of them", f"the file ({CODED}), or a folder for them", _encode
    )


def add_decode(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``decode``."""
    _add_coding(
        command,
        f"a {CODED} file, or a folder of them",
        "the image (.png and others), or a folder for them, as PNG",
        _decode,
    )


def _add_coding(
    command: argparse.ArgumentParser, source: str, out: str, run: Callable[[argparse.Namespace], None]
) -> None:
    add = command.add_argument
    add("source", type=Path, metavar="SOURCE", help=source)
    add("-m", "--model", required=True, metavar="F", help="the model file (.fmpq)")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help=out)
    _add_class(command)
    add_device(command)
    _add_memory(command)
    command.set_defaults(run=run)


def _encode(args: argparse.Namespace) -> None:
    if _is_folder(args.source):
        jobs = _jobs(reading.find(args.source), args.out, CODED)
    else:
        jobs = {args.source: _file(args.out)}
    codec = _codec(args.model, args).to(ranks.own_device(args.device))
    pixels = coded = 0
    for source, out in tqdm(jobs.items(), desc="encode", unit="image", disable=None, leave=False):
        image = reading.read(source)
        data = fmi.encode(codec, image, memory=args.memory)
        with replacing(out) as file:
            file.write(data)
        pixels, coded = pixels + image[0].numel(), coded + len(data)
    images = f"{len(jobs)} image{'s' * (len(jobs) != 1)}"
    print(f"{images}: {coded:,} bytes, {8 * coded / pixels:.4f} bits per pixel: {args.out}")


def _decode(args: argparse.Namespace) -> None:
    if _is_folder(args.source):
        found = sorted(p for p in args.source.iterdir() if p.suffix == CODED and p.is_file())
        if not found:
            raise FmpqError(f"there are no {CODED} files in {args.source}")
        jobs = _jobs(found, args.out, ".png")
    else:
        jobs = {args.source: reading.check_writable(_file(args.out))}
    codec = _codec(args.model, args).to(ranks.own_device(args.device))
    for source, out in tqdm(jobs.items(), desc="decode", unit="image", disable=None, leave=False):
        try:
            image = fmi.decode(codec, source.read_bytes(), memory=args.memory)
        except FmpqError as error:
            raise FmpqError(f"{source}: {error}") from error
        reading.write(image, out)
    print(f"{len(jobs)} image{'s' * (len(jobs) != 1)}: {args.out}")


def _is_folder(source: Path) -> bool:
    if not source.exists():
        raise FmpqError(f"there is no file and no folder {source}")
    return source.is_dir()


def _file(out: Path) -> Path:
    check_folder(out)
    return out


def _jobs(sources: list[Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """Return the file in ``folder``, which is made, for each of ``sources``.

    Raises:
        FmpqError: two of them would be written to one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {source: folder / (source.stem + suffix) for source in sources}
    if len(set(jobs.values())) < len(jobs):
        twice = next(out for out in jobs.values() if list(jobs.values()).count(out) > 1)
        names = " and ".join(source.name for source, out in jobs.items() if out == twice)
        raise FmpqError(f"{names} would both be written to {twice}; rename one")
    return jobs
