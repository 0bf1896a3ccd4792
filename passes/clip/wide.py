"""Find the inputs that are worth 16 bits, by the RD loss with them."""

import math
from collections.abc import Callable, Mapping

from torch import fx, nn

from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.measure.bench import Bench
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.passes.measure.groups import Group, halves, in_groups, subgroups
from fmpq_fx.passes.plan.activations import wide_inputs

NEGLIGIBLE = 1e-4
"""16 bits are tried on all images where they change the RD loss of the first images by more than this fraction."""

SPLITS, AT_ONCE = 64, 8
"""How many groups are split at most, and how many of them between two rankings of the groups."""

Widened = Mapping[str, Callable[[nn.Module], nn.Module]]
"""By site: a function that returns a copy of its layer, with the input rounded to 16 bits."""


def find_wide(
    gm: fx.GraphModule, bench: Bench, widened: Widened, products: Mapping[str, float], budget: float
) -> list[str]:
    """Return the sites whose inputs get 16 bits.

    The first images tell which inputs may be worth it; then all images tell how much. Where there are many sites,
    neighbours are tried together, and groups that save the most are split, down to single sites. The saving of one half
    is measured, that of the other is the rest::

        a b c d e f g h      i j k l m n o p      2.1 and 0.1 % of the RD loss
        └──┬──┘ └──┬──┘      one input each is worth little: not split
          0.2     1.9
                e f   g h
                0.0   1.9    and so on

    Args:
        gm: a rewritten graph in evaluation mode, all of whose inputs are rounded. It is left as it was.
        bench: the images and the distortion of the RD loss.
        widened: the inputs that may get 16 bits.
        products: the products of each site with 8 bits, in any unit.
        budget: how many products may be added, in the same unit.
    """
    groups = in_groups(list(widened))
    meter = ChangeMeter(gm, bench, [part for group in groups for part in subgroups(group)])
    zeta = _narrowed_down(meter, widened, groups)
    if len(bench.pieces) > 1:
        zeta = _zeta(meter, widened, _not_negligible(zeta))
    worth = _not_negligible(zeta)
    by_name = {group[0]: group for group in worth}
    wide = wide_inputs(
        {name: zeta[group] for name, group in by_name.items()},
        {name: math.fsum(products[site] for site in group) for name, group in by_name.items()},
        budget,
    )
    return [site for name in wide for site in by_name[name]]


def _narrowed_down(meter: ChangeMeter, widened: Widened, groups: list[Group]) -> dict[Group, float]:
    """Return the savings of ``groups`` on the first images; groups that save the most were split."""
    zeta = _zeta(meter, widened, groups, begin=True)
    for _ in range(SPLITS // AT_ONCE):
        several = [group for group in _not_negligible(zeta) if len(group) > 1]
        largest = sorted(several, key=zeta.__getitem__, reverse=True)[:AT_ONCE]
        if not largest:
            break
        split = {group: halves(group) for group in largest}
        of_half = _zeta(meter, widened, [half for half, _ in split.values()], begin=True)
        for group, (half, rest) in split.items():
            zeta[half] = of_half[half]
            zeta[rest] = zeta.pop(group) - zeta[half]
    return zeta


def _not_negligible(zeta: Mapping[Group, float]) -> list[Group]:
    return [group for group, saved in zeta.items() if abs(saved) > NEGLIGIBLE]


def _zeta(
    meter: ChangeMeter, widened: Widened, groups: list[Group], *, begin: bool = False
) -> dict[Group, float]:
    """Return how much RD loss each group saves with inputs of 16 bits, as a fraction of the present RD loss.

    With ``begin``, both are measured on the first images alone.
    """
    if not groups:
        return {}
    lmbda = plan_of(meter.gm).lmbda
    changes = {group: {site: widened[site] for site in group} for group in groups}
    sums = meter.measure(changes, "activation bits", begin=begin)
    rd = (meter.measure_first_base() if begin else meter.measure_base()).rd(lmbda)
    return {group: (rd - changed.rd(lmbda)) / rd for group, changed in sums.items()}
