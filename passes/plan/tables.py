"""The results of the passes as immutable tables: sites, their sensitivity, and the plan made from it.

A table goes into a pass and a table comes out, so that deciding, measuring and rewriting stay apart. Sensitivity and
Plan can be saved as JSON and loaded.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from fmpq_fx.passes.plan.inputs import InputGrid, grids_in, products_at
from fmpq_fx.passes.plan.interpolation import interpolated
from fmpq_fx.rd import MSE
from fmpq_fx.storage.files import JsonFile

FLOAT_BITS = 32
"""Bits of a weight that is not quantized: models are trained and stored in float32."""

Table = dict[str, dict[int, float]]
"""A value per site and candidate bit-width: ``{site name: {bits: value}}``."""


def monotone(raw: Mapping[str, Mapping[int, float]]) -> Table:
    """Fit to each site's values the nearest ones (least squares) that never rise with the number of bits.

    Measured zeta is noisy near zero, and a planner that believed a dip would buy bits for a worse model.
    """
    table: Table = {}
    for site, values in raw.items():
        bits = sorted(values)
        fit = isotonic_regression(np.array([values[b] for b in bits], dtype=float), increasing=False)
        table[site] = dict(zip(bits, fit.x.tolist(), strict=True))
    return table


@dataclass(frozen=True)
class Site:
    """One quantizable module of a model; a module called by several nodes is one site."""

    name: str  # qualified module name, e.g. "g_a.0"
    node: str  # name of the first graph node that runs it
    kind: str  # class of the float module, e.g. "ConvTranspose2d"
    params: int  # elements of the weight tensor (for GDN: of gamma)

    def bytes_at(self, bits: int | None) -> float:
        """Nominal bytes of the weights at ``bits`` each; None is float32."""
        return self.params * (FLOAT_BITS if bits is None else bits) / 8


def _table(fields: Mapping[str, Mapping[str, float]]) -> Table:
    """Turn the keys of the inner mappings, which JSON makes strings, back into numbers of bits."""
    return {site: {int(b): float(v) for b, v in values.items()} for site, values in fields.items()}


@dataclass(frozen=True)
class Sensitivity(JsonFile):
    """How much the RD loss grows when one site's weights are quantized and all else stays float.

    Everything is relative to the float model's RD loss on the same images: 0.01 means one per cent. A table may be
    incomplete: :func:`fmpq_fx.prepare` measures only the values that its plan depends on, :func:`fmpq_fx.analyze` all.
    """

    sites: tuple[Site, ...]  # in the order of the graph
    lmbda: float  # the Lagrangian of the RD loss
    float_rate: float  # the float model's rate, bits per pixel
    float_distortion: float  # the float model's lmbda * distortion
    rate: Table  # the rate's part of zeta: (R_n(b) - R) / RD, where it was measured
    distortion: Table  # the distortion's part of zeta: (D_n(b) - D) / RD, where it was measured
    float_remainder: dict[str, int]  # parameters that belong to no site: {name: elements}
    images: str  # the images it was measured on, in words
    # Bit-widths, measured or not; (): the widths that every site was measured at.
    candidates: tuple[int, ...] = ()
    # Digests of "weights" and "images"; {}: not recorded.
    identity: dict[str, str] = field(default_factory=dict)
    metric: str = MSE.name  # the distortion: "mse", "ms-ssim", or "module:function" of a user's function

    @property
    def float_rd(self) -> float:
        """RD loss of the float model: rate + lmbda * distortion."""
        return self.float_rate + self.float_distortion

    @cached_property
    def raw(self) -> Table:
        """Zeta where measured: (RD_n(b) - RD) / RD (Hossain et al. 2025, the fractional RD-loss increase)."""
        return {
            site: {b: rate + self.distortion[site][b] for b, rate in values.items()}
            for site, values in self.rate.items()
        }

    @cached_property
    def zeta(self) -> Table:
        """Zeta as planners use it: :attr:`raw`, interpolated where not measured, monotone in the number of bits."""
        return self.expected(0)

    def expected(self, bound: int, sketch: Table | None = None) -> Table:
        """Return monotone zeta; values not measured are the likeliest (0), the least (-1) or the most (1) expected.

        A ``sketch`` is zeta on a part of the images, for :func:`fmpq_fx.passes.plan.interpolation.interpolated`.
        """
        return monotone(
            {
                site: interpolated(values, self.bits, bound=bound, sketch=(sketch or {}).get(site))
                for site, values in self.raw.items()
            }
        )

    @property
    def bits(self) -> tuple[int, ...]:
        """The candidate bit-widths, ascending."""
        return self.candidates or tuple(sorted(next(iter(self.rate.values()))))

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The sites and bit-widths that were not measured."""
        return [(site.name, b) for site in self.sites for b in self.bits if b not in self.rate[site.name]]

    @property
    def complete(self) -> bool:
        """Whether all values were measured, so that the table serves any target."""
        return not self.missing

    @property
    def extent(self) -> str:
        """How many values were measured, in words."""
        total = len(self.sites) * len(self.bits)
        return f"{total - len(self.missing)} of {total} values measured"

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "Sensitivity":
        fields["sites"] = tuple(Site(**site) for site in fields["sites"])
        fields["rate"], fields["distortion"] = _table(fields["rate"]), _table(fields["distortion"])
        names = {site.name for site in fields["sites"]}
        if not names or set(fields["rate"]) != names or set(fields["distortion"]) != names:
            raise ValueError("its values are not of its sites")
        widths, others = ({s: set(v) for s, v in fields[part].items()} for part in ("rate", "distortion"))
        fields["candidates"] = tuple(int(b) for b in fields.get("candidates", ()))
        allowed = set(fields["candidates"]) or next(iter(widths.values()))
        whole = bool(fields["candidates"]) or all(found == allowed for found in widths.values())
        if widths != others or not allowed or not whole or not all(w <= allowed for w in widths.values()):
            raise ValueError("its sites have different bit-widths")
        return cls(**fields)


@dataclass(frozen=True)
class Measured:
    """RD loss on the calibration images before and after rewriting, rate + lmbda * distortion."""

    float_rd: float  # the float model
    weights_rd: float  # weights quantized, activations float
    rd: float  # weights and activations quantized, as the plan says


@dataclass(frozen=True)
class Plan(JsonFile):
    """The bits of every site, the size they lead to, and how they were found."""

    sites: tuple[Site, ...]  # in the order of the graph
    bits: dict[str, int | None]  # per site; None stays float32
    activation_bits: dict[str, int | None]  # of each site's input; None stays float
    target_cr: float  # the size asked for, as a fraction of float32
    planner: str  # "adaptive", "optimal" or "uniform"
    sensitivity: Sensitivity  # the table that the planner used
    beta: float | None = None  # the tolerance of the plan; None where the planner has none
    history: tuple[tuple[float, float], ...] = ()  # every evaluation of the search: (beta, CR)
    remarks: str = ""  # things that the user should know about the search
    coded: Table | None = None  # bytes per site and width as the model file codes them; None: size is nominal
    clips: dict[str, float] = field(default_factory=dict)  # weight range kept per site, 1.0 is min-max
    # The grid of each site whose input is rounded; {} before calibration.
    inputs: dict[str, InputGrid] = field(default_factory=dict)
    # Multiply-accumulates per site and pixel of the image; {} before calibration.
    macs: dict[str, float] = field(default_factory=dict)
    measured: Measured | None = None  # set once the graph has been rewritten and run
    example: tuple[int, int, int] | None = None  # (C, H, W) of the image that was traced
    left_out: dict[str, str] = field(default_factory=dict)  # layer that is no site -> the reason

    @property
    def lmbda(self) -> float:
        """The Lagrangian of the RD loss that the sensitivity was measured with."""
        return self.sensitivity.lmbda

    @property
    def metric(self) -> str:
        """The distortion of that RD loss: "mse", "ms-ssim", or "module:function" of a user's function."""
        return self.sensitivity.metric

    @property
    def float_remainder(self) -> dict[str, int]:
        """Parameters that belong to no site and stay float32: {name: elements}."""
        return self.sensitivity.float_remainder

    @property
    def float_bytes(self) -> float:
        """Bytes of all sites' weights in float32."""
        return total_bytes(self.sites, dict.fromkeys(self.bits))

    @property
    def nominal_bytes(self) -> float:
        """Sum over sites of params * bits / 8."""
        return total_bytes(self.sites, self.bits)

    def bytes_of(self, site: Site) -> float:
        """Return the bytes of a site at its bits, coded if the plan counts coded bytes, else nominal."""
        bits = self.bits[site.name]
        return site.bytes_at(bits) if self.coded is None or bits is None else self.coded[site.name][bits]

    @property
    def size_bytes(self) -> float:
        """Bytes of all sites before any fine-tuning, coded if the plan counts coded bytes, else nominal."""
        return sum(map(self.bytes_of, self.sites))

    @property
    def cr(self) -> float:
        """:attr:`size_bytes` / float32 bytes of the same sites. Lower is smaller."""
        return self.size_bytes / self.float_bytes

    @property
    def average_bits(self) -> float:
        """Bits per weight, averaged over all weights of all sites, before entropy coding."""
        return FLOAT_BITS * (self.nominal_bytes / self.float_bytes)

    @property
    def rounded_inputs(self) -> list[str]:
        """The sites whose inputs are rounded: neither their weights nor their inputs stay float."""
        return [
            s for s, bits in self.bits.items() if bits is not None and self.activation_bits[s] is not None
        ]

    @property
    def calibrated(self) -> bool:
        """Whether all rounded inputs have their range and steps."""
        return self.inputs.keys() >= set(self.rounded_inputs)

    @property
    def average_activation_bits(self) -> float:
        """Bits per input, averaged over the multiply-accumulates of all sites; over the sites before calibration."""
        weight = self.macs or dict.fromkeys(self.bits, 1.0)
        rounded = set(self.rounded_inputs)
        bits = {
            s: (b if s in rounded and b is not None else FLOAT_BITS) for s, b in self.activation_bits.items()
        }
        return math.fsum(weight[s] * b for s, b in bits.items()) / math.fsum(weight.values())

    def products(self, activation_bits: int | None = None) -> float:
        """Return the products of two 8-bit integers per pixel of the image, over the sites with rounded inputs.

        A number of more than 8 bits counts as two of 8 bits. With ``activation_bits``, all inputs count with these.
        """
        return math.fsum(
            self.macs[site] * products_at(self.bits[site], activation_bits or self.activation_bits[site])
            for site in self.rounded_inputs
        )

    def zeta_of(self, site: str) -> float:
        """Return monotone zeta of ``site`` at its bits: 0 if it stays float, NaN if it is not known."""
        bits = self.bits[site]
        return 0.0 if bits is None else self.sensitivity.zeta[site].get(bits, math.nan)

    def interpolates(self, site: str) -> bool:
        """Return whether zeta of ``site`` at its bits is interpolated. In a plan of ``prepare`` none is."""
        bits = self.bits[site]
        measured = self.sensitivity.raw[site]
        return bits in self.sensitivity.bits and bits not in measured and bool(measured)

    @property
    def predicted(self) -> float:
        """The rise of the RD loss if the rises of single sites added up: the sum of the known zetas; NaN if none is."""
        zeta = [self.zeta_of(site.name) for site in self.sites]
        known = [z for z in zeta if not math.isnan(z)]
        return math.fsum(known) if known else math.nan

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "Plan":
        fields["sites"] = tuple(Site(**site) for site in fields["sites"])
        fields["sensitivity"] = Sensitivity._from_fields(fields["sensitivity"])
        fields["history"] = tuple((float(beta), float(cr)) for beta, cr in fields["history"])
        fields["inputs"] = grids_in(fields)
        if not isinstance(fields["activation_bits"], dict):  # of older plans, which have one for all sites
            fields["activation_bits"] = dict.fromkeys(fields["bits"], fields["activation_bits"])
        fields["coded"] = None if fields["coded"] is None else _table(fields["coded"])
        measured = fields["measured"]
        fields["measured"] = None if measured is None else Measured(**measured)
        example = fields.get("example")  # older plans have none
        fields["example"] = None if example is None else tuple(map(int, example))
        names = {site.name for site in fields["sites"]}
        if set(fields["bits"]) != names or set(fields["activation_bits"]) != names:
            raise ValueError("its bits are not of its sites")
        return cls(**fields)


def total_bytes(sites: Iterable[Site], bits: Mapping[str, int | None]) -> float:
    """Nominal bytes of ``sites`` with ``bits`` each."""
    return sum(site.bytes_at(bits[site.name]) for site in sites)
