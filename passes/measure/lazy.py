"""Plan with the fewest measurements: of nine widths per site, two to six decide the plan.

A plan depends on few values of zeta: on which side of beta they lie, or whether a site at other bits could be part of
a better plan. Values that were not measured are bounded by their neighbours
(:mod:`fmpq_fx.passes.plan.interpolation`)::

    zeta   high ·.                    likely: on a line through what was measured (x), in the logarithm
      │          x'·.                 low, high: how far off it may be, further away from what was measured
    beta ── ── ── ── `x ── ── ──
      │    low   .`    `·.            Here low and high pass beta between the same two widths: nothing is open.
      │               .`   `x         Where they do not, a width between these passages is measured next.
      └──────────────────────── bits

Each round measures, for all sites at once, the values that could still change the plan (:func:`unsettled`), until there
are none. The plan is that of the full table unless a value lies outside its bounds, which can happen where noise
decides.

"adaptive" first does all of this on the first piece of the images alone. That zeta is a sketch: from one width to the
next it changes much as the zeta of all images does. So few values remain to be measured on all images: those at the
plan's own bits, and those close to beta.
"""

import math
from collections.abc import Iterator

from fmpq_fx.passes.annotation import annotate_sites
from fmpq_fx.passes.measure.sensitivity import Point, SensitivityMeter
from fmpq_fx.passes.plan.interpolation import noise_of
from fmpq_fx.passes.plan.knapsack import total_at
from fmpq_fx.passes.plan.planners import Assignment, bits_at, search
from fmpq_fx.passes.plan.tables import FLOAT_BITS, Plan, Sensitivity, Table
from fmpq_fx.passes.plan.task import Task

REGULAR = 0.01
"""A site whose zeta deviates by more than this from falling with the bits is measured at all of them."""


def plan_lazily(task: Task, meter: SensitivityMeter) -> Plan:
    """Plan ``task``, and measure only the values that the plan depends on.

    Zeta at the plan's own bits is always measured, except for "uniform", which needs no zeta. Zeta is noted on the
    nodes of the meter's graph.
    """
    ranks, sketch = meter.changes.bench.ranks, None
    first = set(_first_points(task, meter.table))
    # Not for "optimal": its rivals differ by less than the first images deviate from all images.
    wanted = task.planner == "adaptive" and first and not any(meter.table.raw.values())
    if wanted and (sketched := meter.on_first_piece()) is not None:
        _settle(task, sketched, first)
        sketch = {site: z for site, z in sketched.table.raw.items() if noise_of(z) <= REGULAR}
        likely = ranks.take_first(task.plan(sketched.table))
        first = {(site, b) for site, b in likely.bits.items() if site not in task.given and b is not None}
    _settle(task, meter, first, sketch)
    annotate_sites(meter.changes.gm, zeta=meter.table.zeta)
    return ranks.take_first(task.plan(meter.table, sketch))


def _settle(task: Task, meter: SensitivityMeter, first: set[Point], sketch: Table | None = None) -> None:
    """Measure the ``first`` points, if any, and then all points that the plan depends on."""
    ranks = meter.changes.bench.ranks
    points = first or ranks.take_first(unsettled(task, meter.table, sketch))
    while points:
        meter.measure(points)
        points = ranks.take_first(unsettled(task, meter.table, sketch))


def _first_points(task: Task, table: Sensitivity) -> Iterator[Point]:
    """Yield the average width of each site without any value, and for "optimal" its narrowest; "uniform" needs none."""
    for site, widths in task.cost.items():
        if task.planner != "uniform" and site not in task.given and not table.raw[site]:
            yield site, min(widths, key=lambda b: abs(b - FLOAT_BITS * task.target))
            if task.planner == "optimal":
                yield site, min(widths)


def unsettled(task: Task, table: Sensitivity, sketch: Table | None = None) -> set[Point]:
    """Return the points to measure next; none if the plan is settled. "uniform" is settled from the start.

    Otherwise there are three questions. Each is asked only when those before it are answered:

    1. Which betas does the search visit? ("adaptive" only.) And which sites have an irregular zeta, so that a line
       through a few values says little? These sites are measured at all widths.
    2. Could another plan be better than the likely one? "adaptive" may fill up the budget with any wider width, so all
       of these are measured; for "optimal", the rivals of the plan are.
    3. Were the plan's own bits measured? The plan reports zeta at them, which must not be a guess.
    """
    missing = set(table.missing)
    if not missing or task.planner == "uniform":
        return set()
    likely, low, high = (task.choices(table.expected(bound, sketch)) for bound in (0, -1, 1))
    points = {(site, b) for site, b in missing if b in likely[site] and noise_of(table.raw[site]) > REGULAR}
    if task.planner == "adaptive":
        points |= _unsettled_search(task, likely, low, high, missing)
    if points:
        return points
    found = task.assign(likely)
    # The search ended off the target, and the rest of the budget is filled up.
    if task.planner == "adaptive" and found.remarks:
        start = dict.fromkeys(likely, 0) if found.beta is None else bits_at(likely, found.beta)
        points = {(site, b) for site, b in missing if b in likely[site] and b >= start[site]}
    elif task.planner == "optimal":
        points = _unsettled_optimum(task, found, likely, low, missing)
    chosen = {**found.bits, **task.given}
    return points or {(site, b) for site, b in missing if b == chosen[site]}


def _unsettled_search(task: Task, likely: Table, low: Table, high: Table, missing: set[Point]) -> set[Point]:
    """Return the points that decide the search for beta: one of each site whose bits at a certain beta are open.

    The search is made three times, by the likely values and by either bound. That beta is the last one that all three
    visit before they part, or the last of all if they never do. The sites' bits there decide how the search goes on.
    """
    floor = task.budget - task.window
    paths = [
        [beta for beta, _ in search(zeta, task.cost, floor, task.budget)] for zeta in (likely, low, high)
    ]
    common = 1  # all searches begin with the same beta
    while all(len(path) > common for path in paths) and len({path[common] for path in paths}) == 1:
        common += 1
    beta = paths[0][common - 1]
    fewest, most = bits_at(low, beta), bits_at(high, beta)
    points: set[Point] = set()
    for site, values in likely.items():
        if fewest[site] != most[site]:
            between = [b for b in values if fewest[site] <= b < most[site] and (site, b) in missing]
            # If no missing width lies between, monotone zeta is a mean over widths around: measure one of those.
            around = [b for b in values if (site, b) in missing]
            nearest = min(between or around, key=lambda b: abs(math.log(max(values[b], 1e-12) / beta)))
            points.add((site, nearest))
    return points


def _unsettled_optimum(
    task: Task, found: Assignment, likely: Table, low: Table, missing: set[Point]
) -> set[Point]:
    """Return the points that a plan of less zeta may contain, the likeliest of each site.

    Lagrange's bound: let a byte have any price. Then no plan within the budget has less zeta than the sum of each
    site's least (zeta + price * bytes), minus price * budget. Bits that raise a site's (zeta + price * bytes) above
    its least raise the bound of all plans with these bits as much. If that exceeds the zeta of the best known plan, no
    better plan has these bits.
    """
    price = _price(likely, task.cost, task.budget)
    least = {
        site: min(z + price * task.cost[site][b] for b, z in values.items())
        for site, values in likely.items()
    }
    best = math.fsum(likely[site][b] for site, b in found.bits.items())
    gap = best - (math.fsum(least.values()) - price * task.budget)
    points: set[Point] = set()
    for site, values in likely.items():
        rivals = [
            b
            for b in values
            if (site, b) in missing
            and low[site][b] + price * task.cost[site][b] - least[site] <= gap * (1 + 1e-9)
        ]
        if rivals:
            points.add((site, min(rivals, key=lambda b: values[b] + price * task.cost[site][b])))
    return points


def _price(zeta: Table, cost: Table, budget: float) -> float:
    """Return the least price, zeta per byte, at which the sites' own least zeta + price * bytes fit ``budget``."""

    def fits(price: float) -> bool:
        bits = {s: min(v, key=lambda b: (v[b] + price * cost[s][b], cost[s][b])) for s, v in zeta.items()}
        return total_at(cost, bits) <= budget

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 4 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
