"""Measure what each candidate bit-width of each site costs in RD loss: exactly, by running the model.

Gradients are no substitute: the rounding of the latents makes them zero for the whole analysis transform.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral, Real

from torch import Tensor, fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.incremental import ChangeMeter
from fmpq_fx.passes.sites import annotate, find_sites, float_remainder
from fmpq_fx.passes.tables import Sensitivity
from fmpq_fx.quant import quantize_layer
from fmpq_fx.rd import PEAK, RDSums

CANDIDATE_BITS = range(2, 11)
"""The default candidates, 2 … 10 bits."""

UNBOUNDED = 1e6
"""What a part of zeta that is infinite or undefined counts as: bits that a site must not have."""


def measure_sensitivity(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    *,
    lmbda: float | None = None,
    bits: Iterable[int] | None = None,
    images: str = "",
    memory: int | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure zeta of every site of ``gm`` at every bit-width (min-max scales, activations float).

    Args:
        gm: a traced and functionalized model in evaluation mode. It is left as it was, but for the values of
            zeta, which are written on its nodes, ``node.meta["fmpq"]["zeta"]``.
        batches: calibration images, (B, 3, H, W) each, in [0, 1].
        lmbda: the Lagrangian; None makes rate and distortion of the float model weigh the same.
        bits: candidate bit-widths, each 2 … 16; None is 2 … 10.
        images: what the batches are, in words, for the table.
        memory: bytes of activations to keep at most, see :class:`ChangeMeter`.
        progress: show a progress bar; None shows it on terminals only.

    Raises:
        ValueError: ``bits`` or ``lmbda`` is out of its range.
        FmpqError: the model has nothing to quantize, cannot run on the images, or its RD loss is not finite.
    """
    candidates = checked_bits(bits)
    if lmbda is not None and not (isinstance(lmbda, Real) and math.isfinite(lmbda) and lmbda > 0):
        raise ValueError(
            f"lmbda must be a positive number, as in CompressAI's training (0.013, say); got {lmbda!r}"
        )
    sites = find_sites(gm)
    changes = {
        (site.name, b): (site.name, partial(quantize_layer, bits=b)) for site in sites for b in candidates
    }
    meter = ChangeMeter(gm, batches, memory=memory)
    base = meter.base
    if not (math.isfinite(base.rate) and math.isfinite(base.mse)):
        raise FmpqError(
            f"the model's RD loss on the calibration images is not finite (rate {base.rate} bpp, MSE "
            f"{base.mse}); check the checkpoint, and that the images lie in [0, 1]"
        )
    changed = meter.sums_of(changes, description="sensitivity", progress=progress)
    lmbda = _balanced(base) if lmbda is None else lmbda
    rd = base.rd(lmbda)

    def rate_part(sums: RDSums) -> float:
        return _bounded((sums.rate - base.rate) / rd)

    def distortion_part(sums: RDSums) -> float:
        return _bounded(lmbda * PEAK**2 * (sums.mse - base.mse) / rd)

    table = Sensitivity(
        sites=sites,
        lmbda=lmbda,
        float_rate=base.rate,
        float_distortion=rd - base.rate,
        rate={s.name: {b: rate_part(changed[s.name, b]) for b in candidates} for s in sites},
        distortion={s.name: {b: distortion_part(changed[s.name, b]) for b in candidates} for s in sites},
        float_remainder=float_remainder(gm, sites),
        images=images,
    )
    annotate(gm, "zeta", table.zeta)
    return table


def _bounded(part: float) -> float:
    return part if math.isfinite(part) else UNBOUNDED


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
