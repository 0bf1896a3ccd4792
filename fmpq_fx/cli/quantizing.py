"""The commands that choose bits and train at them: prepare, finetune."""

import argparse
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from torch import fx

from fmpq_fx import ranks
from fmpq_fx.cli.arguments import add_device, add_model, distortion, refuse_metric_of_own
from fmpq_fx.cli.outputs import HISTORY, PICTURE, PLAN, STATE, TABLE, TRAINING, declare, training_checkpoint
from fmpq_fx.formats.state import load_state, save_state, spec_of
from fmpq_fx.history import LOSSES, History, Settings
from fmpq_fx.models.zoo import load_model
from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.plan.planners import PLANNERS
from fmpq_fx.passes.plan.tables import Sensitivity
from fmpq_fx.passes.plan.widths import MIXED
from fmpq_fx.pipeline import SIZES, prepare
from fmpq_fx.report.picture import plot_plan
from fmpq_fx.report.table import bit_table
from fmpq_fx.training.finetuning import finetune

_BY_THE_PLAN = ("lmbda", "lr")  # options of training whose default is the plan's


def add_prepare(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prepare``."""
    add = command.add_argument
    add_model(command)
    add(
        "--target-cr",
        type=float,
        required=True,
        metavar="CR",
        help="quantized / float32 weight bytes: 0.25, or 4",
    )
    add("--images", type=Path, metavar="DIR", help="calibration images; default: scikit-image's photographs")
    add("--lmbda", type=float, metavar="L", help="weight of the distortion; default: as heavy as the rate")
    add(
        "--distortion",
        metavar="mse|ms-ssim",
        help="distortion that the model was trained for, or package.module:function; default: that of --metric",
    )
    add(
        "--planner",
        choices=list(PLANNERS),
        default="adaptive",
        help="FMPQ's search for beta (default), the knapsack, or one width for all",
    )
    add(
        "--size",
        choices=SIZES,
        default="nominal",
        help="bytes that --target-cr counts: nominal, or coded as in the model file",
    )
    add("--bits", type=_bits, metavar="2-10", help="candidate bit-widths, as 2-10 or 4,6,8; default 2-10")
    add(
        "--activation-bits",
        type=_activation_bits,
        action="append",
        default=[],
        metavar="mixed|8|none|SITE=BITS",
        help="bits of the layers' inputs; default mixed: 16 where it pays, else 8; none keeps them float. "
        "SITE=BITS, which may be repeated, sets single sites",
    )
    add(
        "--activation-budget",
        type=float,
        default=0.1,
        metavar="X",
        help="integer products that inputs of 16 bits may add, as a fraction; default 0.1",
    )
    add(
        "--fixed",
        type=_fixed,
        action="append",
        default=[],
        metavar="SITE=BITS",
        help="give a site, or all sites that a glob matches, these bits, or 'none' for float; may be repeated",
    )
    add(
        "--sensitivity",
        type=Path,
        metavar="F",
        help="table to reuse (JSON); values that it lacks are measured and written to it",
    )
    add("--memory", metavar="2GB", help="memory for kept activations; default: a quarter of the machine's")
    add("--plot", type=Path, metavar="F", help="draw bits and zeta per site (png, svg or pdf)")
    add("--plan-out", type=Path, metavar="F", help="write the plan (JSON)")
    add(
        "--out",
        type=Path,
        metavar="STATE",
        help="write the quantized model, for 'finetune' and other commands",
    )
    add_device(command)
    outputs = {"plot": PICTURE, "plan_out": PLAN, "sensitivity": TABLE, "out": STATE}
    declare(command, reads=["model", "checkpoint", "images"], writes=list(outputs.items()))
    command.set_defaults(run=_prepare, shared=True)


def _prepare(args: argparse.Namespace) -> None:
    if args.distortion is not None:  # otherwise --metric names the distortion
        refuse_metric_of_own(args)
    table = Sensitivity.load(args.sensitivity) if args.sensitivity and args.sensitivity.exists() else None
    reuse = table is not None and table.complete
    with ranks.joined(args.device) as device:
        model = load_model(args.model, quality=args.quality, metric=args.metric, checkpoint=args.checkpoint)
        gm = prepare(
            model.to(device),
            args.target_cr,
            calibration=args.images,
            lmbda=args.lmbda,
            bits=args.bits,
            activation_bits={
                site: width for site, width in dict(args.activation_bits).items() if width != MIXED
            },
            activation_budget=args.activation_budget,
            planner=args.planner,
            size=args.size,
            fixed=dict(args.fixed),
            sensitivity=table if reuse else None,
            checkpoint=None if reuse else args.sensitivity,
            distortion=distortion(args.distortion or args.metric),
            memory=args.memory,
        )
        if ranks.is_first():
            _write_prepared(gm, args)


def _write_prepared(gm: fx.GraphModule, args: argparse.Namespace) -> None:
    written = []
    if args.plot is not None:
        plot_plan(gm, args.plot)
        written.append(f"picture: {args.plot}")
    if args.plan_out is not None:
        plan_of(gm).save(args.plan_out)
        written.append(f"plan: {args.plan_out}")
    if args.out is not None:
        save_state(gm, args.out, model=args.model)
        written.append(f"state: {args.out}")
    print(bit_table(gm), *written, sep="\n")


def add_finetune(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``finetune``."""
    add = command.add_argument
    add("state", type=Path, metavar="STATE", help="file that 'prepare --out' or 'finetune --out' wrote")
    add("images", type=Path, metavar="DIR", help="folder of images to train on")
    add("--out", type=Path, required=True, metavar="STATE", help="write the trained model")
    add("--validation", type=Path, metavar="DIR", help="images to validate on; default: a tenth of DIR")
    for option in fields(Settings):
        _add_option(command, option)
    add("--workers", type=int, metavar="X", help="processes that read images ahead")
    add("--history", type=Path, metavar="F", help="write losses and validations (JSON)")
    add_device(command)
    declare(
        command,
        reads=["state", "images", "validation"],
        writes=[("out", STATE), ("out", TRAINING), ("history", HISTORY)],
    )
    command.set_defaults(run=_finetune, shared=True)


def _add_option(command: argparse.ArgumentParser, option: "Field[Any]") -> None:
    """Add an option of training, a field of :class:`Settings`."""
    name, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
    if isinstance(option.default, bool):
        command.add_argument(name, action="store_true", help=text)
    elif option.name == "distortion":
        command.add_argument(name, metavar="mse|ms-ssim", help=text)
    elif option.name == "loss":
        command.add_argument(name, choices=LOSSES, default=option.default, help=text)
    elif option.name in _BY_THE_PLAN:
        command.add_argument(name, type=float, metavar="X", help=f"{text}; default: by the plan")
    else:
        default = option.default
        text = f"{text}; default {default:g}"
        command.add_argument(name, type=type(default), default=default, metavar="X", help=text)


def _finetune(args: argparse.Namespace) -> None:
    options = {option.name: getattr(args, option.name) for option in fields(Settings)}
    options["distortion"] = distortion(args.distortion)
    checkpoint = training_checkpoint(args.out)
    with ranks.joined(args.device) as device:
        gm = load_state(args.state).to(device)
        try:
            history = finetune(
                gm,
                args.images,
                validation=args.validation,
                checkpoint=checkpoint,
                workers=args.workers,
                **options,
            )
        except KeyboardInterrupt:
            if checkpoint.exists() and ranks.is_first():
                print(
                    f"\n{checkpoint} holds the training so far; the same command goes on from it",
                    file=sys.stderr,
                )
            raise
        if ranks.is_first():
            _write_tuned(gm, history, checkpoint, args)


def _write_tuned(gm: fx.GraphModule, history: History, checkpoint: Path, args: argparse.Namespace) -> None:
    save_state(gm, args.out, model=spec_of(args.state))
    checkpoint.unlink(missing_ok=True)
    written = [f"state: {args.out}"]
    if args.history is not None:
        history.save(args.history)
        written.append(f"history: {args.history}")
    print(history, *written, sep="\n")


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


def _width(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        _refuse(f"expected a number of bits or 'none'; got {text!r}")


def _activation_bits(text: str) -> tuple[str, int | str | None]:
    """Parse "mixed", "8", "none" (for all sites) or "g_s.6=16"."""
    if "=" in text:
        return _fixed(text)
    return "*", text if text == MIXED else _width(text)


def _fixed(text: str) -> tuple[str, int | None]:
    site, equals, bits = text.rpartition("=")
    if not equals:
        _refuse(f"expected SITE=BITS, as g_s.6=8 or 'h_*=none'; got {text!r}")
    return site, _width(bits)


def _refuse(message: str) -> NoReturn:
    raise argparse.ArgumentTypeError(message)
