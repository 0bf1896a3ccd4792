"""The search for beta against its alternatives: evaluations, time, and the plan that each reaches.

For each table and target: the adaptive search, a grid of 200 values of beta, the exhaustive enumeration of
every beta at which the plan changes, and the knapsack. Summed zeta is the predicted RD loss above float.

    python benchmarks/search.py out/tables/*.json
"""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from arguments import parser_of
from tabulate import tabulate

from fmpq_fx import Plan, Sensitivity, analyze, samples
from fmpq_fx.passes.plan.planners import bits_at
from fmpq_fx.passes.plan.tables import total_bytes
from fmpq_fx.passes.plan.task import make_plan

TARGETS = (0.30, 0.25, 0.20, 0.1875, 0.15, 0.125, 0.10)
GRID = np.geomspace(1e-6, 1e2, 200)


def best_of(betas: Iterable[float], table: Sensitivity, target_cr: float) -> tuple[int, float, float]:
    """Return how many values of beta there are, and CR and summed zeta of the largest plan under the target."""
    float_bytes = total_bytes(table.sites, dict.fromkeys(table.zeta))
    tried, best = 0, (float("nan"), float("nan"))
    for beta in betas:
        tried += 1
        bits = bits_at(table.zeta, beta)
        cr = total_bytes(table.sites, bits) / float_bytes
        if cr <= target_cr and not cr <= best[0]:
            best = cr, sum(table.zeta[site][b] for site, b in bits.items())
    return tried, *best


def breakpoints(table: Sensitivity) -> list[float]:
    """Return every beta at which the plan changes: just above each value of zeta."""
    return sorted({float(np.nextafter(z, np.inf)) for values in table.zeta.values() for z in values.values()})


def rows_for(table: Sensitivity, target_cr: float) -> list[tuple[object, ...]]:
    """Return a row per way of planning: name, evaluations, time in ms, CR, summed zeta in %."""
    rows: list[tuple[object, ...]] = []
    for planner in ("adaptive", "optimal"):
        start = time.perf_counter()
        plan: Plan = make_plan(table, target_cr, planner=planner)
        elapsed = 1e3 * (time.perf_counter() - start)
        evaluations = len(plan.history) if planner == "adaptive" else ""
        remark = " (filled up)" if plan.remarks else ""
        rows.append((planner + remark, evaluations, elapsed, plan.cr, 100 * plan.predicted))
    for name, betas in (("grid", list(GRID)), ("every breakpoint", breakpoints(table))):
        start = time.perf_counter()
        tried, cr, zeta = best_of(betas, table, target_cr)
        rows.append((name, tried, 1e3 * (time.perf_counter() - start), cr, 100 * zeta))
    return rows


def main() -> None:
    """Print the comparison for each table."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "tables", nargs="*", type=Path, help="saved by analyze(); default: measure the sample model"
    )
    args = parser.parse_args()
    tables = {path.stem: Sensitivity.load(path) for path in args.tables}
    if not tables:
        tables["sample model"] = analyze(samples.model(), lmbda=0.013)
    headers = ["target CR", "planner", "evaluations", "time (ms)", "CR", "sum of zeta (%)"]
    for name, table in tables.items():
        print(f"\n{name}: {len(table.sites)} sites, lambda {table.lmbda:g}, {table.images}")
        rows = [(target, *row) for target in TARGETS for row in rows_for(table, target)]
        print(tabulate(rows, headers, floatfmt=("g", "", "", ".1f", ".4f", ".3f")))


if __name__ == "__main__":
    main()
