"""Save the benchmarks' pictures."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from fmpq_fx.storage.files import replacing


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``, all of it or nothing, and close it."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), dpi=120)
    plt.close(figure)
