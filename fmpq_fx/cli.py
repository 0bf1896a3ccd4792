"""The command line, ``fmpq-fx``: the public API with the same words."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fmpq_fx.demo import demo
from fmpq_fx.errors import FmpqError
from fmpq_fx.evaluate import evaluate
from fmpq_fx.files import check_folder, write_text
from fmpq_fx.passes.planners import PLANNERS
from fmpq_fx.passes.rewrite import plan_of
from fmpq_fx.passes.tables import Sensitivity
from fmpq_fx.picture import check_plot_path, plot_plan
from fmpq_fx.prepare import prepare
from fmpq_fx.report import bit_table
from fmpq_fx.zoo import load_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (those of the process by default) and return the exit status."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("fmpq-fx: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    except (FmpqError, ValueError, OSError) as error:
        print(f"fmpq-fx: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fmpq-fx",
        description="Mixed-precision quantization of learned image compression models, as a torch.fx pass.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(
        commands.add_parser("prepare", help="quantize a model to a size and print its bit-width table")
    )
    _add_evaluate(commands.add_parser("evaluate", help="code images for real and measure rate and quality"))
    command = commands.add_parser(
        "demo", help="quantize the trained sample model and compare with uniform bits"
    )
    command.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for the picture")
    command.set_defaults(run=lambda args: demo(args.out))
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="'sample', a name of CompressAI's zoo, or package.module:callable")
    add("--quality", type=int, metavar="Q", help="of CompressAI's pretrained weights, 1 to 8")
    add("--checkpoint", type=Path, metavar="F", help="trained weights of the model")


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("images", type=Path, metavar="DIR", help="folder of images, of any size")
    command.add_argument("--json", type=Path, metavar="F", help="write the results per image and their means")
    command.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_folder(args.json)
    model = load_model(args.model, quality=args.quality, checkpoint=args.checkpoint)
    results = evaluate(model, args.images)
    print(results)
    if args.json is not None:
        write_text(args.json, results.to_json())
        print(f"results: {args.json}")


def _add_prepare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(command)
    add(
        "--target-cr",
        type=float,
        required=True,
        metavar="CR",
        help="quantized / float32 weight bytes: 0.25, or 4",
    )
    add("--images", type=Path, metavar="DIR", help="calibration images; default: scikit-image's photographs")
    add("--lmbda", type=float, metavar="L", help="weight of the distortion; default: as heavy as the rate")
    add("--planner", choices=list(PLANNERS), default="adaptive")
    add("--bits", type=_bits, metavar="2-10", help="candidate bit-widths, as 2-10 or 4,6,8; default 2-10")
    add(
        "--activation-bits",
        type=_activation_bits,
        default=8,
        metavar="8|none",
        help="bits of every layer's input; none keeps activations float",
    )
    add(
        "--fixed",
        type=_fixed,
        action="append",
        default=[],
        metavar="SITE=BITS",
        help="give a site, or all that a glob matches, these bits, or 'none' for float; may be repeated",
    )
    add(
        "--sensitivity",
        type=Path,
        metavar="F",
        help="table to reuse (JSON); measured and written if not there",
    )
    add("--plot", type=Path, metavar="F", help="draw bits and zeta per site (png, svg or pdf)")
    add("--plan-out", type=Path, metavar="F", help="write the plan (JSON)")
    command.set_defaults(run=_prepare)


def _prepare(args: argparse.Namespace) -> None:
    # Before the long measurement, not after it.
    if args.plot is not None:
        check_plot_path(args.plot)
    for path in (args.plan_out, args.sensitivity):
        if path is not None:
            check_folder(path)
    reuse = args.sensitivity is not None and args.sensitivity.exists()
    model = load_model(args.model, quality=args.quality, checkpoint=args.checkpoint)
    gm = prepare(
        model,
        args.target_cr,
        calibration=args.images,
        lmbda=args.lmbda,
        bits=args.bits,
        activation_bits=args.activation_bits,
        planner=args.planner,
        fixed=dict(args.fixed),
        sensitivity=Sensitivity.load(args.sensitivity) if reuse else None,
    )
    if args.sensitivity is not None and not reuse:
        plan_of(gm).sensitivity.save(args.sensitivity)
    print(bit_table(gm))
    if args.plot is not None:
        plot_plan(gm, args.plot)
        print(f"picture: {args.plot}")
    if args.plan_out is not None:
        plan_of(gm).save(args.plan_out)
        print(f"plan: {args.plan_out}")


def _bits(text: str) -> list[int]:
    """Parse "2-10" or "4,6,8"."""
    try:
        low, dash, high = text.partition("-")
        bits = list(range(int(low), int(high) + 1)) if dash else [int(b) for b in text.split(",")]
    except ValueError:
        bits = []
    if not bits:
        _refuse(f"expected bit-widths as 2-10 or 4,6,8; got {text!r}")
    return bits


def _activation_bits(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        _refuse(f"expected a number of bits or 'none'; got {text!r}")


def _fixed(text: str) -> tuple[str, int | None]:
    site, equals, bits = text.rpartition("=")
    if not equals:
        _refuse(f"expected SITE=BITS, as g_s.6=8 or 'h_*=none'; got {text!r}")
    return site, _activation_bits(bits)


def _refuse(message: str) -> NoReturn:
    raise argparse.ArgumentTypeError(message)
