"""Arguments that the command lines of the benchmarks share."""

import argparse
from pathlib import Path

from fmpq_fx.passes.plan.widths import MIXED


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is ``description``, line by line as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--checkpoint``, which load_model() takes."""
    parser.add_argument("--model", default="sample", help="'sample' or a name of CompressAI's zoo")
    parser.add_argument("--checkpoint", type=Path, help="trained weights of the model")


def add_sample_and_folders(parser: argparse.ArgumentParser) -> None:
    """Add the lambda of a sample model, and the image folders that it is prepared, fine-tuned and measured on."""
    parser.add_argument("--lmbda", type=float, default=0.013, help="of the sample model")
    parser.add_argument("--calibration", required=True, help="image folder to prepare with")
    parser.add_argument("--train", required=True, help="image folder to fine-tune on")
    parser.add_argument("--images", required=True, help="image folder to measure the RD loss on")


def activation_bits(text: str) -> int | str | None:
    """Return prepare()'s argument of that name from the command line; "0" is float."""
    return text if text == MIXED else int(text) or None


def add_activation_bits(parser: argparse.ArgumentParser, default: list[int | str | None]) -> None:
    """Add ``--activation-bits``, one or more values of prepare()'s argument."""
    parser.add_argument(
        "--activation-bits",
        type=activation_bits,
        nargs="+",
        default=default,
        help="0 is float",
    )
