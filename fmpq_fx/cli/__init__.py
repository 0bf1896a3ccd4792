"""The command line, ``fmpq-fx``: the public functions under the same words. It may import everything."""

from fmpq_fx.cli.main import main

__all__ = ["main"]
