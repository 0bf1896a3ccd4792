"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fmpq_fx.images.distortions import DISTORTIONS, Given
from fmpq_fx.models.zoo import imported, model_factory
from fmpq_fx.onnx.codec import BACKENDS
from fmpq_fx.onnx.runtimes import PRECISIONS

CODED = ".fmi"
MODEL = ".fmpq"


def add_model(command: argparse.ArgumentParser, others: str = "") -> None:
    """Add the arguments that name a model: "model", "quality" and "checkpoint"."""
    add = command.add_argument
    add(
        "model",
        metavar="MODEL",
        help=f"{others}'sample', a name of CompressAI's zoo, or package.module:callable",
    )
    add("--quality", type=int, metavar="Q", help="quality of CompressAI's pretrained weights, 1 to 8")
    add("--metric", choices=sorted(DISTORTIONS), help="distortion that these were trained for; default mse")
    add("--checkpoint", type=Path, metavar="F", help="trained weights of the model")


def distortion(text: str | None) -> Given | None:
    """Return the distortion that ``--distortion`` names: a built-in one, or "package.module:function"."""
    return imported(text, "a distortion") if text is not None and ":" in text else text


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the argument that names the device to compute on."""
    command.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda",
        help="device to compute on; default cpu; cuda:1 is the second GPU",
    )


def add_memory(command: argparse.ArgumentParser) -> None:
    """Add the argument that limits the memory of coding."""
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory that coding may take, as 2GB or 500MB, in tiles if needed; default: a quarter of the machine's",
    )


def add_robust(command: argparse.ArgumentParser) -> None:
    """Add the argument that says how coded images survive another machine."""
    command.add_argument(
        "--robust",
        type=lambda text: None if text == "none" else text,
        choices=["auto", "exact", "guarded", None],
        default="auto",
        metavar="{auto,exact,guarded,none}",
        help="how images decode on another machine: in exact arithmetic, or with guarded CDFs if the model has no "
        "exact form (auto)",
    )


def add_class(command: argparse.ArgumentParser) -> None:
    """Add the argument that names a callable which makes a model of the user's own class."""
    command.add_argument(
        "--class",
        dest="cls",
        metavar="package.module:callable",
        help="callable that makes the model of a .fmpq file, if it is not of CompressAI's zoo",
    )


def made_by(args: argparse.Namespace) -> Callable[[], nn.Module] | None:
    """Return the callable that makes the model of a .fmpq file; None if the command line names none."""
    return None if args.cls is None else model_factory(args.cls)


OPTION_OF = {"providers": "onnxruntime", "precision": "openvino"}
"""Option -> the backend that has it."""


def add_backend(command: argparse.ArgumentParser) -> None:
    """Add the arguments that select the runtime for the transforms of a model file."""
    add = command.add_argument
    add("--backend", choices=BACKENDS, default="torch", help="runtime for the transforms of a .fmpq file")
    add(
        "--graphs",
        type=Path,
        metavar="DIR",
        help="folder that 'export onnx' wrote, or to write graphs to; default: beside the file",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="threads of torch and of the runtime; default: their own choice",
    )
    add(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="providers of ONNX Runtime, CUDAExecutionProvider say; the first that can compute an operation does",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="type of what OpenVINO computes in no integers: f32 (the default), or bf16, if the processor has it",
    )


def refuse_unused(args: argparse.Namespace, *options: str, because: str) -> None:
    """Raise a ValueError if one of ``options`` is given, which would change nothing."""
    for option in options:
        if getattr(args, option) is not None:
            name = {"cls": "class"}.get(option, option)
            raise ValueError(f"--{name} would change nothing: {because}; leave it out")


def refuse_metric_of_own(args: argparse.Namespace) -> None:
    """Raise a ValueError if --metric is given, but the weights are not CompressAI's pretrained ones."""
    if args.checkpoint is not None or ":" in args.model:
        own = args.checkpoint or args.model
        because = f"it chooses among CompressAI's pretrained weights, and those of {own} are wanted"
        refuse_unused(args, "metric", because=because)


def set_threads(args: argparse.Namespace) -> None:
    """Set the number of torch's threads that the command line gives."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; pass 1 or more, or leave it out")
        torch.set_num_threads(args.threads)
