"""The command line, ``fmpq-fx``: the public API with the same words."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fmpq_fx import ranks
from fmpq_fx.cli import coding, quantizing, shipping
from fmpq_fx.cli.demo import add_demo
from fmpq_fx.cli.outputs import check_outputs
from fmpq_fx.cli.printing import forgiving
from fmpq_fx.errors import FmpqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (those of the process by default) and return the exit status."""
    with forgiving():
        args = parser().parse_args(arguments)
        try:
            if ranks.started() > 1 and not args.shared:
                raise FmpqError("this command runs in one process; torchrun is for 'prepare' and 'finetune'")
            check_outputs(args)
            args.run(args)
        except KeyboardInterrupt:
            print("fmpq-fx: interrupted; no file was left half-written", file=sys.stderr)
            return 130
        except (FmpqError, ValueError, OSError) as error:
            print(f"fmpq-fx: error: {ranks.who()}{_sentence(error)}", file=sys.stderr)
            return 2
        return 0


def _sentence(error: Exception) -> str:
    """Return the text of ``error``, without the system's error number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a subparser for each command."""
    parser = argparse.ArgumentParser(
        prog="fmpq-fx",
        description="Mixed-precision quantization of learned image compression models, as a torch.fx pass.",
        epilog="'torchrun --nproc-per-node N -m fmpq_fx …' runs prepare and finetune in N processes.",
    )
    packages = ("fmpq-fx", "torch", "compressai")
    parser.add_argument(
        "--version", action="version", version=", ".join(f"{name} {version(name)}" for name in packages)
    )
    parser.set_defaults(shared=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text, add_arguments in (
        ("prepare", "quantize a model to a size and print its bit-width table", quantizing.add_prepare),
        ("finetune", "train a quantized model at its bits", quantizing.add_finetune),
        ("evaluate", "code images for real and measure rate and quality", coding.add_evaluate),
        ("export", "write a quantized model to ship it", shipping.add_export),
        ("inspect", "print where the bytes of a model file are", shipping.add_inspect),
        ("encode", "encode images with a model file", coding.add_encode),
        ("decode", "decode images with the model file they were encoded with", coding.add_decode),
        ("demo", "quantize the trained sample model and compare with uniform bits", add_demo),
    ):
        add_arguments(commands.add_parser(name, help=text))
    return parser
