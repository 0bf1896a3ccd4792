"""The commands that write a quantized model for other programs, and look into a model file: export, inspect."""

import argparse
from pathlib import Path

from fmpq_fx.cli.arguments import MODEL, add_class, made_by
from fmpq_fx.cli.outputs import CHECKPOINT, GRAPHS, MODEL_MARK, Output, declare
from fmpq_fx.coding.conversion import export_checkpoint
from fmpq_fx.formats.model_file import load, save
from fmpq_fx.formats.state import load_state
from fmpq_fx.onnx.export import export_onnx
from fmpq_fx.onnx.forms import FORMS
from fmpq_fx.report.file_bytes import file_report
from fmpq_fx.storage.files import check_folder


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the kinds of ``export`` and their arguments."""
    kinds = command.add_subparsers(required=True, metavar="KIND")
    checkpoint = kinds.add_parser(
        "checkpoint", help="dequantized weights, which a stock CompressAI loads; activations are float there"
    )
    model = kinds.add_parser("model", help="a model file at its real size, to encode and decode with")
    for kind, form, output, run in (
        (checkpoint, "the checkpoint (.pth.tar)", CHECKPOINT, _export_checkpoint),
        (model, "the model file (.fmpq)", Output(MODEL_MARK, _check_model), _export_model),
    ):
        kind.add_argument("state", type=Path, metavar="STATE", help="file that 'prepare' or 'finetune' wrote")
        kind.add_argument("--out", type=Path, required=True, metavar="F", help=form)
        declare(kind, reads=["state"], writes=[("out", output)])
        kind.set_defaults(run=run)
    onnx = kinds.add_parser("onnx", help="ONNX graphs with integer weights, one for each part of the model")
    add = onnx.add_argument
    add("state", type=Path, metavar="STATE", help="file that 'prepare' or 'finetune' wrote, or a .fmpq file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the graphs and their manifest")
    add(
        "--form",
        choices=FORMS,
        default=FORMS[0],
        help="form of layers: portable for every runtime, onnxruntime for speed in ONNX Runtime on CPUs",
    )
    add_class(onnx)
    declare(onnx, reads=["state"], writes=[("out", GRAPHS)])
    onnx.set_defaults(run=_export_onnx)


def _check_model(path: Path) -> None:
    check_folder(path)
    if path.suffix != MODEL:
        raise ValueError(f"a model file is named *{MODEL}; got {path}")


def _export_onnx(args: argparse.Namespace) -> None:
    gm = load(args.state, model=made_by(args)) if args.state.suffix == MODEL else load_state(args.state)
    print(export_onnx(gm, args.out, form=args.form))
    print(f"graphs: {args.out}")


def _export_checkpoint(args: argparse.Namespace) -> None:
    export_checkpoint(load_state(args.state), args.out)
    print(f"checkpoint: {args.out}")


def _export_model(args: argparse.Namespace) -> None:
    save(load_state(args.state), args.out)
    print(f"model: {args.out}, {args.out.stat().st_size:,} bytes; 'fmpq-fx inspect' says where they are")


def add_inspect(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    command.add_argument("file", type=Path, metavar="FILE", help="a model file (.fmpq)")
    declare(command, reads=["file"])
    command.set_defaults(run=lambda args: print(file_report(args.file)))
