"""Measure the rise of the RD loss for each candidate bit-width of each site: exactly, by running the model.

Gradients are no substitute: the rounding of the latents makes them zero for the whole analysis transform.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from numbers import Integral, Real
from operator import itemgetter

from torch import fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_sites
from fmpq_fx.passes.measure.bench import Bench, mean_rd
from fmpq_fx.passes.measure.changes import Change, ChangeMeter
from fmpq_fx.passes.plan.tables import Sensitivity, Site, Table
from fmpq_fx.passes.sites import find_sites, float_remainder
from fmpq_fx.progress import reported
from fmpq_fx.quant import quantize_layer
from fmpq_fx.rd import RDSums

Point = tuple[str, int]
"""A site's name, and bits of its weights."""

CANDIDATE_BITS = range(2, 11)
"""The default candidates, 2 … 10 bits."""

UNBOUNDED = 1e6
"""Stands for a rate or distortion part of zeta that is infinite or NaN: a site must not have such bits."""


@dataclass(frozen=True)
class Measurement:
    """The order to measure zeta: the options, and the table of what is known already."""

    # The Lagrangian; None makes rate and distortion of the float model weigh the same.
    lmbda: float | None = None
    bits: tuple[int, ...] | None = None  # candidates; None is the candidates of ``known``, or else 2 … 10
    images: str = ""  # the images in words, for the table
    identity: Mapping[str, str] = field(default_factory=dict)  # digests of the "weights" and of the "images"
    known: Sensitivity | None = None  # only what it lacks is measured
    # The file that the table is written to as it grows; ``known`` was read from it.
    checkpoint: str | os.PathLike[str] | None = None


class SensitivityMeter:
    """Measures zeta where it is asked for (min-max scales, activations float), and keeps :attr:`table`.

    Args:
        changes: the meter of a traced model in evaluation mode, which is left as it was.
        table: the values that are known.
        checkpoint: a file that the table is written to after each measurement.
    """

    def __init__(
        self, changes: ChangeMeter, table: Sensitivity, checkpoint: str | os.PathLike[str] | None = None
    ):
        self.changes, self.table, self.checkpoint = changes, table, checkpoint

    def measure_float_rd(self) -> float:
        """Return the RD loss of the float model."""
        changes, lmbda = self.changes, self.table.lmbda
        if changes.base is None:  # nothing was measured, so no values need to be kept
            return mean_rd(changes.gm, changes.bench, lmbda)
        return changes.base.rd(lmbda)

    def measure(self, points: Iterable[Point], title: str | None = "sensitivity") -> None:
        """Measure zeta at ``points``, put it into :attr:`table`, and write that to the checkpoint.

        Args:
            points: the points to measure; known ones are left out.
            title: the title of the progress bar; None shows no bar.
        """
        wanted = set(points)
        changes = {
            (site, b): {site: partial(quantize_layer, bits=b)}
            for site, b in self.table.missing
            if (site, b) in wanted
        }
        self._add(self._measured(changes, title))
        if self.checkpoint is not None and self.changes.bench.ranks.is_first:
            self.table.save(self.checkpoint)

    def on_first_piece(self) -> "SensitivityMeter | None":
        """Return a meter that measures on the first piece of the images alone; None if there is only one piece.

        Points that it measured take less time to measure on all images afterwards.
        """
        if len(self.changes.bench.pieces) < 2:
            return None
        nothing: Table = {site.name: {} for site in self.table.sites}
        return _FirstPiece(self.changes, replace(self.table, rate=nothing, distortion=nothing))

    def _measured(self, changes: Mapping[Point, Change], title: str | None) -> dict[Point, RDSums]:
        return self.changes.measure(changes, title)

    def _base(self) -> RDSums:
        return self.changes.measure_base()

    def _add(self, measured: Mapping[Point, RDSums]) -> None:
        base, lmbda = self._base(), self.table.lmbda
        rd = base.rd(lmbda)
        rate = {point: (sums.rate - base.rate) / rd for point, sums in measured.items()}
        distortion = {point: lmbda * (s.distortion - base.distortion) / rd for point, s in measured.items()}
        self.table = replace(
            self.table,
            rate=_with(self.table.rate, rate),
            distortion=_with(self.table.distortion, distortion),
        )


class _FirstPiece(SensitivityMeter):
    """See :meth:`SensitivityMeter.on_first_piece`."""

    def _measured(self, changes: Mapping[Point, Change], title: str | None) -> dict[Point, RDSums]:
        return self.changes.measure(changes, title, begin=True)

    def _base(self) -> RDSums:
        return self.changes.measure_first_base()


def begin(gm: fx.GraphModule, bench: Bench, measurement: Measurement) -> SensitivityMeter:
    """Check the ``measurement``, and measure the float model if there is no table yet.

    Args:
        gm: a traced model in evaluation mode. It is left as it was.
        bench: the images, the distortion and the memory.
        measurement: the order to measure.

    Raises:
        ValueError: ``bits`` or ``lmbda`` is out of its range, or differs from ``known``.
        FmpqError: the model has nothing to quantize, cannot run on the images, or its RD loss is not finite;
            ``known`` is of another model; or it is incomplete or a checkpoint, and of other weights or images.
    """
    sites, known, lmbda = find_sites(gm), measurement.known, measurement.lmbda
    candidates = checked_bits(measurement.bits)
    _check_lmbda(lmbda)
    changes = ChangeMeter(gm, bench)
    if known is not None:
        _check_same(
            known, sites, lmbda, None if measurement.bits is None else candidates, bench.distortion.name
        )
        if measurement.checkpoint is not None or not known.complete:
            _check_identity(known, measurement.identity)
        return SensitivityMeter(changes, known, measurement.checkpoint)
    base = changes.measure_base()
    lmbda = _balanced(base) if lmbda is None else lmbda
    nothing: Table = {site.name: {} for site in sites}
    table = Sensitivity(
        sites=sites,
        lmbda=lmbda,
        float_rate=base.rate,
        float_distortion=base.rd(lmbda) - base.rate,
        rate=nothing,
        distortion=nothing,
        float_remainder=float_remainder(gm, sites),
        images=measurement.images,
        candidates=candidates,
        identity=dict(measurement.identity),
        metric=bench.distortion.name,
    )
    return SensitivityMeter(changes, table, measurement.checkpoint)


def measure_sensitivity(gm: fx.GraphModule, bench: Bench, measurement: Measurement) -> Sensitivity:
    """Measure zeta of every site of ``gm`` at every bit-width, and note it on the nodes of ``gm``.

    The arguments and the errors are those of :func:`begin`.
    """
    meter = begin(gm, bench, measurement)
    if meter.checkpoint is None:
        meter.measure(meter.table.missing)
    else:  # the checkpoint is written after each site
        sites = [list(points) for _, points in groupby(meter.table.missing, key=itemgetter(0))]
        for points in reported(sites, "sensitivity", "site", show=bench.progress):
            meter.measure(points, title=None)
    annotate_sites(gm, zeta=meter.table.zeta)
    return meter.table


def _with(table: Table, values: Mapping[Point, float]) -> Table:
    """Return ``table`` with ``values`` added, ascending in the bits."""
    added = {site: dict(known) for site, known in table.items()}
    for (site, b), value in values.items():
        added[site][b] = value if math.isfinite(value) else UNBOUNDED
    return {site: dict(sorted(known.items())) for site, known in added.items()}


def _check_lmbda(lmbda: float | None) -> None:
    if lmbda is not None and not (isinstance(lmbda, Real) and math.isfinite(lmbda) and lmbda > 0):
        raise ValueError(
            f"lmbda must be a positive number, as in CompressAI's training (0.013, say); got {lmbda!r}"
        )


def _check_same(
    known: Sensitivity,
    sites: tuple[Site, ...],
    lmbda: float | None,
    bits: tuple[int, ...] | None,
    metric: str,
) -> None:
    """Check that ``known`` has these sites and options.

    Raises:
        ValueError: ``known`` is for another ``lmbda``, other ``bits`` or another distortion.
        FmpqError: the sites of ``known`` are others.
    """
    if known.sites != sites:
        raise FmpqError(
            "the sensitivity is of another model: its sites or their sizes differ; measure this model with analyze()"
        )
    if metric != known.metric:
        raise ValueError(
            f"the sensitivity was measured with the distortion {known.metric}, and {metric} was asked for; leave "
            "distortion out, or measure again with analyze(model, distortion=...)"
        )
    if lmbda is not None and lmbda != known.lmbda:
        raise ValueError(
            f"the sensitivity was measured with lmbda {known.lmbda:g}, and {lmbda:g} was asked for; leave lmbda "
            f"out, or measure again with analyze(model, lmbda={lmbda:g})"
        )
    if bits is not None and bits != known.bits:
        raise ValueError(
            f"the sensitivity is for {list(known.bits)} bits, and {list(bits)} were asked for; leave bits out, or "
            "measure again with analyze(model, bits=...)"
        )


def _check_identity(known: Sensitivity, identity: Mapping[str, str]) -> None:
    """Check that measuring can go on from ``known``.

    Raises:
        FmpqError: ``known`` is of other weights or images.
    """
    for name, value in identity.items():
        if known.identity.get(name) != value:
            raise FmpqError(
                f"the sensitivity ({known.extent}) was measured with other {name}, so measuring cannot go on from "
                f"it; pass the same {name}, or measure anew: without sensitivity=, or with another checkpoint="
            )


def checked_bits(bits: Iterable[int] | None) -> tuple[int, ...]:
    """Return candidate bit-widths ascending, the default ones for None.

    Raises:
        TypeError: ``bits`` is not iterable.
        ValueError: ``bits`` is empty, or one of them is no whole number from 2 to 16.
    """
    if bits is not None and not isinstance(bits, Iterable):
        raise TypeError(f"bits is {bits!r}; pass several widths, such as range(2, 11), or [{bits!r}] for one")
    given = list(CANDIDATE_BITS if bits is None else bits)
    if not given or any(isinstance(b, bool) or not isinstance(b, Integral) for b in given):
        raise ValueError(f"bits must be whole numbers, at least one, as in range(2, 11); got {given}")
    if min(given) < 2 or max(given) > 16:
        raise ValueError(f"bits must lie in 2 … 16; got {given}")
    return tuple(sorted({int(b) for b in given}))


def _balanced(base: RDSums) -> float:
    """Return the Lagrangian that makes rate and distortion weigh the same."""
    if base.distortion <= 0 or base.rate <= 0:
        raise FmpqError(
            f"nothing balances rate {base.rate} bpp and distortion {base.distortion} on the calibration images; "
            "pass lmbda="
        )
    return base.rate / base.distortion
