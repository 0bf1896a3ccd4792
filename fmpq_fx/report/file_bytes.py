"""A table of the bytes of a model file, by their purpose."""

import json
import os
from dataclasses import dataclass
from typing import Any

from tabulate import SEPARATING_LINE, tabulate

from fmpq_fx.formats.model_file import blaming, plan_in
from fmpq_fx.quant import integer_range
from fmpq_fx.report.table import factor
from fmpq_fx.storage import container, weight_coder


@dataclass(frozen=True)
class SiteBytes:
    """The bytes of one site in a model file."""

    site: str
    kind: str  # class of the float module
    bits: int
    nominal: float  # parameters * bits / 8
    coded: int  # bytes of its integers
    side: int  # bytes of the model that they are coded with


@dataclass(frozen=True)
class FileReport:
    """The bytes of a model file; :attr:`parts` add up to :attr:`size`."""

    path: str
    model: str  # class, and name in CompressAI's zoo
    sites: tuple[SiteBytes, ...]  # the quantized sites, in the order of the plan
    float_bytes: float  # bytes of their weights in float32
    quantizers: int  # bytes of steps of weights and activations, and of zero points
    words: int  # bytes of plan, history, names and shapes
    remainder: int  # bytes of float tensors: biases, GDN's betas, entropy models
    tables: int  # bytes of CDF tables
    container: int  # bytes of the file's header
    size: int  # bytes of the file

    @property
    def coded(self) -> int:
        """Bytes of all integers."""
        return sum(site.coded for site in self.sites)

    @property
    def nominal(self) -> float:
        """Nominal bytes of all quantized weights."""
        return sum(site.nominal for site in self.sites)

    @property
    def side(self) -> int:
        """Bytes of the models that the integers are coded with."""
        return sum(site.side for site in self.sites)

    @property
    def parts(self) -> dict[str, int]:
        """All bytes of the file, by purpose, each counted once."""
        return {
            "coded weights": self.coded,
            "side information of their coding": self.side,
            "steps and zero points": self.quantizers,
            "plan, names and shapes": self.words,
            "container": self.container,
            "float parameters": self.remainder,
            "CDF tables": self.tables,
        }

    @property
    def overhead(self) -> float:
        """Fraction of the file that is neither coded weights nor float parameters nor tables."""
        return 1 - (self.coded + self.remainder + self.tables) / self.size

    @property
    def coded_cr(self) -> float:
        """Bytes of the coded weights, side information included, / their float32 bytes; quantized sites only."""
        return (self.coded + self.side) / self.float_bytes

    def __str__(self) -> str:
        rows: list[Any] = [_row(s.site, s.kind, str(s.bits), s.nominal, s.coded, s.side) for s in self.sites]
        rows += [
            SEPARATING_LINE,
            _row(f"{len(self.sites)} sites", "", "", self.nominal, self.coded, self.side),
        ]
        headers = (
            "site",
            "kind",
            "bits",
            "nominal bytes",
            "coded bytes",
            "coded / nominal",
            "side information",
        )
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 5))
        parts = [
            (name, f"{count:,}", f"{100 * count / self.size:.2f} %") for name, count in self.parts.items()
        ]
        parts.append(("file", f"{self.size:,}", "100.00 %"))
        sums = tabulate(parts, tablefmt="plain", disable_numparse=True, colalign=("left", "right", "right"))
        return (
            f"{self.path}: {self.model}\n\n{table}\n\n{sums}\n\n"
            f"CR of the coded weights {self.coded_cr:.4f} ({factor(self.coded_cr)} than float32)"
        )


def _row(site: str, kind: str, bits: str, nominal: float, coded: int, side: int) -> tuple[str, ...]:
    return site, kind, bits, f"{nominal:,.0f}", f"{coded:,}", f"{coded / max(nominal, 1):.3f}", f"{side:,}"


def file_report(path: str | os.PathLike[str]) -> FileReport:
    """Return a report of the bytes of the model file ``path``; they add up to its size exactly.

    Raises:
        FmpqError: the file is no model file, or damaged.
    """
    held = container.read(path)
    with blaming(path):
        words = json.loads(container.unpacked(held.data["words"]))
        plan, identity = plan_in(words), held.about["model"]
        kinds = {site.name: site for site in plan.sites}
        sites = []
        for name, bits in plan.bits.items():
            if bits is None:
                continue
            data = held.data[f"weights.{name}"]
            layout = tuple(map(int, words["layouts"][name]))
            side = weight_coder.side_bytes(data, layout, *integer_range(bits, words["signed"][name]))
            site = kinds[name]
            sites.append(SiteBytes(name, site.kind, bits, site.bytes_at(bits), len(data) - side, side))
        return FileReport(
            path=str(path),
            model=identity["class"] + (f" ({identity['zoo']})" if identity["zoo"] else ""),
            sites=tuple(sites),
            float_bytes=sum(kinds[s.site].bytes_at(None) for s in sites),
            quantizers=len(held.data["quantizers"]),
            words=len(held.data["words"]),
            remainder=len(held.data["model"]),
            tables=len(held.data["tables"]),
            container=held.overhead,
            size=held.size,
        )
