"""The multiple-choice knapsack: one width for each site, so that all sites fit a budget and cost the least zeta.

HiGHS solves it, behind ``scipy.optimize.milp``.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Values = Mapping[str, Mapping[int, float]]
"""A value per site and candidate bit-width, read-only."""

MAX_NODES, MAX_CUTS = 1000, 100
"""The nodes and the cuts after which a search by HiGHS ends unproven.

Measured sensitivities take tens of nodes and no cut. A window of a few bytes, or zeta in proportion to size, is a
subset-sum problem, which may take for ever.
"""


def least_zeta(
    zeta: Values, cost: Values, floor: float, budget: float, unit: float
) -> tuple[dict[str, int] | None, bool]:
    """Minimize the sum of zeta over the plans that take ``floor`` to ``budget`` bytes.

    Every width of every site is a variable x, 1 if the site takes that width and 0 if it does not. For two
    sites, g_a.0 of 2, 4 or 8 bits and h_s.2 of 2 or 4 bits, HiGHS is given::

                     g_a.0            h_s.2
                 2     4     8       2     4
        zeta   [ 0.9   0.1   0       0.2   0  ]   times x is to be as small as can be
        g_a.0  [ 1     1     1                ]   times x is 1: the site takes one width
        h_s.2  [                     1     1  ]   times x is 1
        bytes  [ 0     200   600     0     50 ]   times x is floor to budget, all three less each site's fewest bytes
        cut    [             1             1  ]   times x is at most 1: not both, that plan was over the budget

    HiGHS has absolute tolerances, 1e-6 for rows, whole numbers and the objective. So bytes are counted in thousandths
    of the bytes that the budget leaves to spend, and zeta in millionths of ``unit``. A plan that only a tolerance lets
    pass is cut off, and HiGHS solves again. Presolve is off: it saves little, and in HiGHS 1.12 it "solved" problems
    like these that have no solution (see also scipy #24141).

    Returns:
        The bits of each site, or None if no plan was found; and whether it is proven that no plan is better, or
        that there is none.
    """
    least = {site: min(values.values()) for site, values in zeta.items()}
    cheapest = {site: min(cost[site][b] for b in values) for site, values in zeta.items()}
    used = math.fsum(cheapest.values())
    spare = budget - used
    choices = [(s, b) for s in zeta for b in zeta[s] if cost[s][b] - cheapest[s] <= spare * (1 + 1e-9)]
    objective = np.array([1e6 * ((zeta[s][b] - least[s]) / (unit or 1.0)) for s, b in choices])
    extra = np.array([1e3 * ((cost[s][b] - cheapest[s]) / (spare or 1.0)) for s, b in choices])
    member = np.array([[site == s for s, _ in choices] for site in zeta], dtype=float)
    rows = [
        LinearConstraint(member, 1, 1),
        LinearConstraint(extra[None], 1e3 * ((floor - used) / (spare or 1.0)), 1e3),
    ]
    for _ in range(MAX_CUTS):
        result = milp(
            objective,
            integrality=np.ones(len(choices), dtype=int),
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0, "presolve": False, "node_limit": MAX_NODES},
        )
        if result.x is None:
            return None, result.status == 2  # infeasible, where not given up
        taken = result.x > 0.5
        bits = {site: b for (site, b), x in zip(choices, taken, strict=True) if x}
        if floor <= total_at(cost, bits) <= budget:
            return bits, result.status == 0
        rows.append(LinearConstraint(taken[None].astype(float), -np.inf, len(bits) - 1))
    return None, False


def total_at(values: Values, bits: Mapping[str, int]) -> float:
    """Sum a table over the sites at their bits: the exact sum, rounded once."""
    return math.fsum(values[site][b] for site, b in bits.items())
