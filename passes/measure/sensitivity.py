"""Measure what each candidate bit-width of each site costs in RD loss: exactly, by running the model.

Gradients are no substitute: the rounding of the latents makes them zero for the whole analysis transform.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from numbers import Integral, Real
from typing import Any

from torch import Tensor, fx

from fmpq_fx import ranks
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_sites
from fmpq_fx.passes.measure.incremental import ChangeMeter, mean_rd
from fmpq_fx.passes.plan.tables import Sensitivity, Site, Table
from fmpq_fx.passes.sites import find_sites, float_remainder
from fmpq_fx.quant import quantize_layer
from fmpq_fx.rd import PEAK, RDSums

Point = tuple[str, int]
"""A site's name, and bits of its weights."""

CANDIDATE_BITS = range(2, 11)
"""The default candidates, 2 … 10 bits."""

UNBOUNDED = 1e6
"""What a part of zeta that is infinite or undefined counts as: bits that a site must not have."""


class SensitivityMeter:
    """Measures zeta where it is asked for (min-max scales, activations float), and keeps :attr:`table`.

    Args:
        gm: a traced model in evaluation mode. It is left as it was.
        batches: calibration images, (B, 3, H, W) each, in [0, 1].
        lmbda: the Lagrangian; None makes rate and distortion of the float model weigh the same.
        bits: candidate bit-widths, each 2 … 16; None is 2 … 10.
        images: what the batches are, in words, for the table.
        identity: digests of the model's "weights" and of the "images", by which measuring can go on from the table.
        memory: bytes of activations to keep at most; see :class:`ChangeMeter`.
        known: what was measured already, of the same model; only what it lacks is measured. ``lmbda`` and ``bits``
            are then left out, or those of that table.
        checkpoint: a file to write the table to whenever something was measured; ``known`` is what it held.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Raises:
        ValueError: ``bits`` or ``lmbda`` is out of its range, or not that of ``known``.
        FmpqError: the model has nothing to quantize, cannot run on the images, or its RD loss is not finite;
            ``known`` is of another model, or, incomplete or a checkpoint, of other weights or images.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        batches: Sequence[Tensor],
        *,
        lmbda: float | None = None,
        bits: Iterable[int] | None = None,
        images: str = "",
        identity: Mapping[str, str] | None = None,
        memory: int | None = None,
        known: Sensitivity | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ):
        self.gm, self.batches, self.memory = gm, batches, memory
        self.checkpoint, self.progress = checkpoint, progress
        sites = find_sites(gm)
        candidates = checked_bits(bits)
        _check_lmbda(lmbda)
        if known is not None:
            _check_same(known, sites, lmbda, None if bits is None else candidates)
            if checkpoint is not None or not known.complete:
                _check_identity(known, identity or {})
            self.table = known
            return
        base = self._meter.base
        lmbda = _balanced(base) if lmbda is None else lmbda
        nothing: Table = {site.name: {} for site in sites}
        self.table = Sensitivity(
            sites=sites,
            lmbda=lmbda,
            float_rate=base.rate,
            float_distortion=base.rd(lmbda) - base.rate,
            rate=nothing,
            distortion=nothing,
            float_remainder=float_remainder(gm, sites),
            images=images,
            candidates=candidates,
            identity=dict(identity or {}),
        )

    @cached_property
    def _meter(self) -> ChangeMeter:
        """What measures; it runs the float model, so it is made when something is to be measured."""
        meter = ChangeMeter(self.gm, self.batches, memory=self.memory)
        if not (math.isfinite(meter.base.rate) and math.isfinite(meter.base.mse)):
            raise FmpqError(
                f"the model's RD loss on the calibration images is not finite (rate {meter.base.rate} bpp, MSE "
                f"{meter.base.mse}); check the checkpoint, and that the images lie in [0, 1]"
            )
        return meter

    @property
    def float_rd(self) -> float:
        """The RD loss of the float model on the batches."""
        if "_meter" not in vars(self):  # nothing was measured, so there is no need for what measuring keeps
            return mean_rd(self.gm, self.batches, self.table.lmbda)
        return self._meter.base.rd(self.table.lmbda)

    def measure(self, points: Iterable[Point]) -> None:
        """Measure zeta at ``points``, put it into :attr:`table`, and write that to the checkpoint."""
        wanted = set(points)
        changes = {
            (site, b): (site, partial(quantize_layer, bits=b))
            for site, b in self.table.missing
            if (site, b) in wanted
        }
        self._add(self._meter.sums_of(changes, description="sensitivity", progress=self.progress))
        if self.checkpoint is not None and ranks.is_first():
            self.table.save(self.checkpoint)

    def _add(self, measured: Mapping[Point, RDSums]) -> None:
        base, lmbda = self._meter.base, self.table.lmbda
        rd = base.rd(lmbda)
        rate = {point: (sums.rate - base.rate) / rd for point, sums in measured.items()}
        distortion = {point: lmbda * PEAK**2 * (s.mse - base.mse) / rd for point, s in measured.items()}
        self.table = replace(
            self.table,
            rate=_with(self.table.rate, rate),
            distortion=_with(self.table.distortion, distortion),
        )


def measure_sensitivity(gm: fx.GraphModule, batches: Sequence[Tensor], **options: Any) -> Sensitivity:
    """Measure zeta of every site of ``gm`` at every bit-width.

    The arguments, and what is raised, are those of :class:`SensitivityMeter`. Zeta is noted on the nodes of
    ``gm``.
    """
    meter = SensitivityMeter(gm, batches, **options)
    missing = meter.table.missing
    # All at once saves work, but a checkpoint is to be written after each site.
    whole = meter.checkpoint is None
    for _, points in groupby(missing, key=lambda point: whole or point[0]):
        meter.measure(points)
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
) -> None:
    """Check that ``known`` is of such a model.

    Raises:
        ValueError: it is for another ``lmbda`` or other ``bits``.
        FmpqError: its sites are others.
    """
    if known.sites != sites:
        raise FmpqError(
            "the sensitivity is of another model: its sites or their sizes differ; measure this model with analyze()"
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
        FmpqError: it is of other weights or images.
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
        ValueError: there are none, or one is no whole number from 2 to 16.
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
    if base.mse <= 0 or base.rate <= 0:
        raise FmpqError(
            f"nothing balances rate {base.rate} bpp and MSE {base.mse} on the calibration images; pass lmbda="
        )
    return base.rate / (PEAK**2 * base.mse)
