"""``python -m fmpq_fx`` is ``fmpq-fx``."""

import sys

from fmpq_fx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
