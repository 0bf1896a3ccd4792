"""What the command lines of the benchmarks have in common."""

import argparse
from pathlib import Path


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is ``description``, line by line as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--checkpoint``, which load_model() takes."""
    parser.add_argument("--model", default="sample", help="'sample' or a name of CompressAI's zoo")
    parser.add_argument("--checkpoint", type=Path, help="trained weights of the model")
