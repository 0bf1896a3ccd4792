"""Find the inputs that are worth 16 bits, by what the RD loss becomes with them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx, nn

from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.measure.bench import Bench
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.passes.measure.groups import Group, halves, in_groups, parts
from fmpq_fx.passes.plan.activations import wide_inputs

NEGLIGIBLE = 1e-4
"""By what part of it the RD loss of the first images changes, up or down, where 16 bits are tried on all of them."""

SPLITS, AT_ONCE = 64, 8
"""How many groups are split at most, and how many before it is seen which come next."""

Widened = Mapping[str, Callable[[nn.Module], nn.Module]]
"""By site: what returns a copy of its layer whose input is rounded to 16 bits."""


def find_wide(
    gm: fx.GraphModule, bench: Bench, widened: Widened, products: Mapping[str, float], budget: float
) -> list[str]:
    """Return the sites whose inputs get 16 bits.

    The first images tell which are worth it, all of them by how much. Where there are many sites, neighbours are tried
    together, and groups that save the most are split, down to single sites. What one half saves is measured, what the
    other does is the rest::

        a b c d e f g h      i j k l m n o p      2.1 and 0.1 % of the RD loss
        └──┬──┘ └──┬──┘      one input each is worth little: not split
          0.2     1.9
                e f   g h
                0.0   1.9    and so on

    Args:
        gm: a rewritten graph in evaluation mode, all of whose inputs are rounded. It is left as it was.
        bench: what the RD loss is measured on.
        widened: what is tried.
        products: of each site with 8 bits, in any unit.
        budget: how many more products there may be, in the same unit.
    """
    first = replace(bench, pieces=bench.pieces[:1])
    zeta = _narrowed_down(gm, first, widened)
    if len(bench.pieces) > 1:
        worth = _not_negligible(zeta)
        zeta = _zeta(ChangeMeter(gm, bench, worth), widened, worth)
    worth = _not_negligible(zeta)
    by_name = {group[0]: group for group in worth}
    wide = wide_inputs(
        {name: zeta[group] for name, group in by_name.items()},
        {name: math.fsum(products[site] for site in group) for name, group in by_name.items()},
        budget,
    )
    return [site for name in wide for site in by_name[name]]


def _narrowed_down(gm: fx.GraphModule, bench: Bench, widened: Widened) -> dict[Group, float]:
    """Return what groups of inputs save, those that save the most by themselves."""
    groups = in_groups(list(widened))
    meter = ChangeMeter(gm, bench, [part for group in groups for part in parts(group)])
    zeta = _zeta(meter, widened, groups)
    for _ in range(SPLITS // AT_ONCE):
        several = [group for group in _not_negligible(zeta) if len(group) > 1]
        largest = sorted(several, key=zeta.__getitem__, reverse=True)[:AT_ONCE]
        if not largest:
            break
        split = {group: halves(group) for group in largest}
        of_half = _zeta(meter, widened, [half for half, _ in split.values()])
        for group, (half, rest) in split.items():
            zeta[half] = of_half[half]
            zeta[rest] = zeta.pop(group) - zeta[half]
    return zeta


def _not_negligible(zeta: Mapping[Group, float]) -> list[Group]:
    return [group for group, saved in zeta.items() if abs(saved) > NEGLIGIBLE]


def _zeta(meter: ChangeMeter, widened: Widened, groups: list[Group]) -> dict[Group, float]:
    """Return what it costs, in fractions of the RD loss, that inputs are rounded as they are and not to 16 bits."""
    if not groups:
        return {}
    lmbda = plan_of(meter.gm).lmbda
    changes = {group: {site: widened[site] for site in group} for group in groups}
    sums = meter.measure(changes, "activation bits")
    rd = meter.measure_base().rd(lmbda)
    return {group: (rd - changed.rd(lmbda)) / rd for group, changed in sums.items()}
