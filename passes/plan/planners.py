"""Assign a bit-width to every site: three planners, pure functions of two tables and a budget.

========  ===========================================================================================
planner   what it does
========  ===========================================================================================
adaptive  FMPQ's search for the tolerance beta (Hossain, Duan, Zhu, arXiv 2506.01221)
optimal   the multiple-choice knapsack: the least sum of zeta that fits, proven where the solver can
uniform   one width for all sites, the baseline
========  ===========================================================================================

All of them take ``zeta[site][bits]``, the fractional RD-loss increase, never rising with bits (zeros, ties
and slightly negative values are fine), and ``cost[site][bits]`` in bytes, rising with bits and not
necessarily linear in them: entropy-coded sizes are not. Sites may differ in their candidate widths; a site
with a single one is a fixed site. None of them returns a plan above the budget.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fmpq_fx.passes.plan.knapsack import Values, least_zeta, total_at

START_BETA = 0.01
"""Where every search for beta begins: each site may cost one per cent of the RD loss."""

FAR_FACTOR, NEAR_FACTOR = 5.0, 2.0
"""By how much a step changes beta before the first change of direction (Hossain, Duan, Zhu)."""

NEAR = 2.6
"""A size is near the target when it is within this many windows of the middle of the window.

One bit less makes the squared error four times as large, so that a step by f moves the average width by
log4(f) bits: 1.16 for 5 and 0.5 for 2. Of a window of 0.01 of the float bytes, 0.32 bits, that is 3.6 and
1.6: from within (3.6 + 1.6) / 2 windows, the smaller step ends nearer to the middle.
"""


@dataclass(frozen=True)
class Assignment:
    """The bits of every site, and how a planner found them."""

    bits: dict[str, int]  # per site, in the order of the tables
    beta: float | None = None  # the tolerance of the plan, or of the plan that was filled up to this one
    history: tuple[tuple[float, float], ...] = ()  # every evaluation of a search: (beta, bytes)
    remarks: str = ""  # things that the user should know about the search


def adaptive(
    zeta: Values, cost: Values, budget: float, *, window: float, max_evaluations: int = 12
) -> Assignment:
    """Search for the tolerance beta whose plan takes [budget - window, budget] bytes.

    The size is a staircase in beta. Where no step of it lies in the window, the largest plan seen under the
    budget is filled up with the upgrades that buy the most zeta per byte; if that ends below the window, the
    plan of least zeta in the window is taken. So the size is in the window whenever any plan's size is (or the
    remarks say that HiGHS gave up). If it is below, no site can be widened within the budget.

    Args:
        zeta: fractional RD-loss increase per site and bits.
        cost: bytes per site and bits.
        budget: the most bytes that all sites may take together.
        window: how many bytes below the budget the size may end (FMPQ: 0.01 of the float bytes).
        max_evaluations: the largest number of values of beta that are tried.

    Raises:
        ValueError: even the cheapest plan is over the budget, or the tables do not match or are not finite.
    """
    cheapest = _cheapest(zeta, cost, budget)
    floor = budget - window
    history = tuple(search(zeta, cost, floor, budget, max_evaluations))
    size, beta = max(((size, beta) for beta, size in history if size <= budget), default=(None, None))
    bits = cheapest if beta is None else bits_at(zeta, beta)
    if size is not None and size >= floor:
        return Assignment(bits, beta, history)

    remarks = (
        f"The size is a staircase in beta, and none of the {len(history)} values tried ends "
        f"between {floor:,.0f} and {budget:,.0f} bytes. "
    )
    filled = _fill(bits, zeta, cost, floor, budget)
    start, end = total_at(cost, bits), total_at(cost, filled)
    if end >= floor:
        remarks += f"Filled up from {start:,.0f} to {end:,.0f} bytes with what buys the most zeta per byte."
        return Assignment(filled, beta, history, remarks)
    spread = sum(max(values.values()) - min(values.values()) for values in zeta.values())
    within, proven = least_zeta(zeta, cost, floor, budget, spread)
    if within is not None:
        how = "of least zeta" if proven else "of the least zeta found"
        return Assignment(within, None, history, remarks + f"This is the plan {how} that does.")
    how = "No plan does" if proven else "No plan was found that does"
    return Assignment(filled, beta, history, remarks + f"{how}; this one takes {end:,.0f} bytes.")


def bits_at(zeta: Values, beta: float) -> dict[str, int]:
    """Give each site the fewest bits b with zeta(b) < beta: FMPQ's rule.

    Candidates are scanned from the widest down to the first that exceeds the tolerance; a site where not
    even the widest meets it gets the widest.
    """
    bits = {}
    for site, values in zeta.items():
        widths = sorted(values, reverse=True)
        bits[site] = widths[0]
        for b in widths:
            if not values[b] < beta:
                break
            bits[site] = b
    return bits


def search(
    zeta: Values, cost: Values, floor: float, budget: float, max_evaluations: int = 12
) -> Iterator[tuple[float, float]]:
    """Try values of beta until the size is in [floor, budget] or no other size is left; yield (beta, bytes).

    The size changes only where beta passes a level: a positive zeta at a width that is not the widest of its site.
    So the number of levels below beta identifies the plan. The search keeps an interval of these numbers, from the
    narrowest plan known to be over the budget (``over``) to the widest known to be under the floor (``under``). A
    step that would leave the interval, or stay on the same plan, halves the interval instead.
    """
    levels = sorted({z for values in zeta.values() for b, z in values.items() if z > 0 and b < max(values)})
    over = -1
    under = len(levels) + (total_at(cost, bits_at(zeta, math.inf)) >= floor)
    beta, turns, upward = START_BETA, 0, None
    for _ in range(max_evaluations):
        size = total_at(cost, bits_at(zeta, beta))
        yield beta, size
        if floor <= size <= budget:
            return
        passed = bisect_left(levels, beta)
        over, under = (passed, under) if size > budget else (over, passed)
        if under - over <= 1:
            return
        turns += upward not in (None, size > budget)
        upward = size > budget
        near = abs(size - (floor + budget) / 2) <= NEAR * (budget - floor)
        # After a change of direction, a step goes back by half of the last one, in log beta.
        factor = (NEAR_FACTOR if near else FAR_FACTOR) ** (0.5**turns)
        beta = beta * factor if upward else beta / factor
        if not over < bisect_left(levels, beta) < under:
            middle = (over + under) // 2
            beta = levels[middle] if middle < len(levels) else math.nextafter(levels[-1], math.inf)


def _fill(bits: Mapping[str, int], zeta: Values, cost: Values, floor: float, budget: float) -> dict[str, int]:
    """Widen sites while they fit the budget; upgrades that buy the most zeta per byte come first.

    An upgrade may skip widths, so that a plateau of zeta does not hide the fall behind it. Upgrades that
    buy nothing are made too, largest first, but only while the size is below ``floor``.
    """
    bits = dict(bits)
    while True:
        size = total_at(cost, bits)
        upgrades = []
        for site, now in bits.items():
            for b in (b for b in zeta[site] if b > now):
                gain, extra = zeta[site][now] - zeta[site][b], cost[site][b] - cost[site][now]
                if extra > 0 and (gain > 0 or (gain == 0 and size < floor)):
                    upgrades.append((gain / extra, extra, site, b))
        for _, _, site, b in sorted(upgrades, reverse=True):
            if total_at(cost, {**bits, site: b}) <= budget:
                bits[site] = b
                break
        else:
            return bits


def optimal(zeta: Values, cost: Values, budget: float) -> Assignment:
    """Minimize the sum of zeta under the budget: the multiple-choice knapsack, by HiGHS, without a gap.

    Among widths of a site that have the same zeta, the plan has the cheapest. The tables, the budget and the errors
    are as for :func:`adaptive`.
    """
    cheapest = _cheapest(zeta, cost, budget)
    worth = {site: _worthwhile(zeta[site], cost[site]) for site in zeta}
    excess = {site: {b: zeta[site][b] - min(zeta[site].values()) for b in worth[site]} for site in zeta}
    best = _fill(cheapest, worth, cost, -math.inf, budget)
    # HiGHS proves optimality to an absolute 1e-6, so the zeta of the best known plan is the unit, and single values
    # above that zeta leave the table. Each round looks for a better plan; the last, in the optimum's unit, finds none.
    proven = True
    while proven and (most := total_at(excess, best)) > 0:
        left = {site: {b: z for b, z in values.items() if z <= most} for site, values in excess.items()}
        found, proven = least_zeta(left, cost, -math.inf, budget, most)
        if found is None or total_at(excess, found) >= most:
            break
        best = found
    return Assignment(best, remarks="" if proven else "It was not proven that no plan has less zeta.")


def _worthwhile(zeta: Mapping[int, float], cost: Mapping[int, float]) -> dict[int, float]:
    """Drop the widths of a site that have no less zeta than a cheaper one."""
    kept: dict[int, float] = {}
    for b in sorted(zeta, key=lambda b: (cost[b], zeta[b])):
        if not kept or zeta[b] < min(kept.values()):
            kept[b] = zeta[b]
    return kept


def uniform(zeta: Values, cost: Values, budget: float) -> Assignment:
    """Give all sites one bit-width, the largest that fits the budget.

    A site without that candidate gets its nearest width below, or else its narrowest. The tables, the budget and
    the errors are as for :func:`adaptive`; the values of zeta do not matter.
    """
    bits = _cheapest(zeta, cost, budget)
    for width in sorted({b for values in cost.values() for b in values}):
        wider = {s: max((b for b in values if b <= width), default=min(values)) for s, values in cost.items()}
        if total_at(cost, wider) <= budget:
            bits = wider
    return Assignment(bits)


def _cheapest(zeta: Values, cost: Values, budget: float) -> dict[str, int]:
    """Return the plan of the fewest bytes, after checking that the tables match and that it fits.

    Raises:
        ValueError: the tables do not match, or the plan does not fit.
    """
    widths, sizes = ({site: set(values) for site, values in table.items()} for table in (zeta, cost))
    if not widths or not all(widths.values()) or widths != sizes:
        raise ValueError("zeta and cost are not of the same sites and bit-widths; pass tables that are")
    for site, b in ((site, b) for site, values in zeta.items() for b in values):
        if not (math.isfinite(zeta[site][b]) and math.isfinite(cost[site][b])):
            raise ValueError(
                f"site {site!r} at {b} bits: zeta {zeta[site][b]}, cost {cost[site][b]} bytes; both must be "
                "finite, so leave that width out of the candidates or measure it again"
            )
    bits = {site: min(values, key=lambda b: (cost[site][b], zeta[site][b])) for site, values in zeta.items()}
    if not total_at(cost, bits) <= budget:
        raise ValueError(
            f"even the cheapest plan takes {total_at(cost, bits):,.0f} bytes and the budget is {budget:,.0f}; "
            "raise the budget or allow fewer bits"
        )
    return bits


PLANNERS: dict[str, Callable[..., Assignment]] = {
    "adaptive": adaptive,
    "optimal": optimal,
    "uniform": uniform,
}
"""The planners by name; ``adaptive`` alone takes a ``window``."""
