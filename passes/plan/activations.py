"""Choose the inputs that get 16 bits: those that save the most RD loss, under a budget of products."""

from collections.abc import Mapping

from fmpq_fx.passes.plan.knapsack import least_zeta
from fmpq_fx.passes.plan.widths import NARROW, WIDE


def wide_inputs(zeta: Mapping[str, float], products: Mapping[str, float], budget: float) -> tuple[str, ...]:
    """Choose the sites whose inputs get 16 bits instead of 8.

    An input of 16 bits takes two products of 8-bit integers, and one of 8 bits takes one (see
    :func:`fmpq_fx.passes.plan.inputs.products_at`). The choice lowers the sum of zeta the most (a knapsack, solved
    exactly).

    Args:
        zeta: the cost of 8 bits instead of 16, by site, in fractions of the RD loss.
        products: the products with 8 bits, by site.
        budget: how many products may be added.
    """
    worth = {site: cost for site, cost in zeta.items() if cost > 0 and products[site] <= budget}
    if not worth:
        return ()
    table = {site: {NARROW: cost, WIDE: 0.0} for site, cost in worth.items()}
    more = {site: {NARROW: 0.0, WIDE: products[site]} for site in worth}
    bits, _ = least_zeta(table, more, 0.0, budget, max(worth.values()))
    return () if bits is None else tuple(site for site, width in bits.items() if width == WIDE)
