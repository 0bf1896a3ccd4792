"""Plan with the fewest measurements: of nine widths per site, two to six decide the plan.

A plan rests on few values of zeta: which side of beta they lie on, or whether a site at other bits could be part of a
cheaper plan. Values that were not measured are bounded by their neighbours
(:mod:`fmpq_fx.passes.plan.interpolation`)::

    zeta   high ·.                    likely: on a line through what was measured (x), in the logarithm
      │          x'·.                 low, high: how far off it may be, further away from what was measured
    beta ── ── ── ── `x ── ── ──
      │    low   .`    `·.            Here low and high pass beta between the same two widths: nothing is open.
      │               .`   `x         Where they do not, a width between these passages is measured next.
      └──────────────────────── bits

Each round measures, for all sites at once, what the plan may hang on by what is known (:func:`unsettled`), until that
is nothing. The plan is that of the full table as long as no value is outside of its bounds; where noise decides, that
can happen.

For "adaptive", all of this is done on the first images alone before. From one width to the next their zeta goes much as
that of all images, so that on these few values are open: the plan's own, and what lies next to beta.
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
    """Plan ``task``, measuring what the plan rests on.

    The plan's own bits are always among it, so that what the plan says of itself was measured; "uniform" rests on
    nothing, and says nothing of zeta. Zeta is noted on the nodes of the meter's graph.
    """
    ranks, sketch = meter.changes.bench.ranks, None
    first = set(_first_points(task, meter.table))
    # A rival of the optimum is told by less than what the first images are off by.
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
    """Measure the ``first`` points, where there are any, and all that the plan hangs on."""
    ranks = meter.changes.bench.ranks
    points = first or ranks.take_first(unsettled(task, meter.table, sketch))
    while points:
        meter.measure(points)
        points = ranks.take_first(unsettled(task, meter.table, sketch))


def _first_points(task: Task, table: Sensitivity) -> Iterator[Point]:
    """Yield the average width for each site of which nothing is known; "uniform" asks for none."""
    for site, widths in task.cost.items():
        if task.planner != "uniform" and site not in task.given and not table.raw[site]:
            yield site, min(widths, key=lambda b: abs(b - FLOAT_BITS * task.target))
            if task.planner == "optimal":
                yield site, min(widths)


def unsettled(task: Task, table: Sensitivity, sketch: Table | None = None) -> set[Point]:
    """Return what to measure next, nothing if the plan is settled, as one by "uniform" is from the first.

    Otherwise there are three questions, and one is asked only once those before it are answered:

    1. Which way does the search for beta take? ("adaptive" only.) And are there sites whose zeta is not regular, of
       which a line through a few values says little? Those are measured at all widths.
    2. What else could be better than the plan that is likely now? "adaptive" fills up what is left of the budget by all
       wider values; "optimal" may have rivals.
    3. Were the plan's own bits measured? What it says of itself is not to be guessed.
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
    if (
        task.planner == "adaptive" and found.remarks
    ):  # the search ended off the target, and what is left is filled up
        start = dict.fromkeys(likely, 0) if found.beta is None else bits_at(likely, found.beta)
        points = {(site, b) for site, b in missing if b in likely[site] and b >= start[site]}
    elif task.planner == "optimal":
        points = _unsettled_optimum(task, found, likely, low, missing)
    chosen = {**found.bits, **task.given}
    return points or {(site, b) for site, b in missing if b == chosen[site]}


def _unsettled_search(task: Task, likely: Table, low: Table, high: Table, missing: set[Point]) -> set[Point]:
    """Return what decides the search for beta: of each site whose bits at beta are open, one point.

    The search is made three times, by the likely values and by either bound. At the first beta after which the three
    go different ways, or at the last if they never do, the sites' bits are what the way hangs on.
    """
    floor = task.budget - task.window
    ways = [[beta for beta, _ in search(zeta, task.cost, floor, task.budget)] for zeta in (likely, low, high)]
    alike = 1  # all searches begin with the same beta
    while all(len(way) > alike for way in ways) and len({way[alike] for way in ways}) == 1:
        alike += 1
    beta = ways[0][alike - 1]
    fewest, most = bits_at(low, beta), bits_at(high, beta)
    points: set[Point] = set()
    for site, values in likely.items():
        if fewest[site] != most[site]:
            between = [b for b in values if fewest[site] <= b < most[site] and (site, b) in missing]
            # A mean over measured and other widths, by which zeta was made monotone, is decided next to them.
            around = [b for b in values if (site, b) in missing]
            nearest = min(between or around, key=lambda b: abs(math.log(max(values[b], 1e-12) / beta)))
            points.add((site, nearest))
    return points


def _unsettled_optimum(
    task: Task, found: Assignment, likely: Table, low: Table, missing: set[Point]
) -> set[Point]:
    """Return the points that a plan of less zeta may have, the likeliest of each site.

    By Lagrange's bound: at any price of a byte, no plan within the budget has less than the sum of the sites'
    least zeta + price * bytes, less that of the budget; and a plan with a site at other bits has at least as much
    more as these bits cost the site. What exceeds the best plan known by that cannot be in a better one.
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
    """Return the least zeta per byte at which the sites, each for itself, ask for no more than ``budget``."""

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
