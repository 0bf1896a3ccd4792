"""The search for beta on sensitivity tables that were measured on models, not made up.

``tests/data`` holds what ``benchmarks/sensitivity.py --out`` wrote for a trained scale hyperprior and a trained
mean-scale hyperprior, and for mbt2018 and cheng2020-anchor with random weights, whose zeta is mostly flat.
"""

from pathlib import Path

import pytest

from fmpq_fx import Sensitivity
from fmpq_fx.passes.plan.task import make_plan
from support import TESTS

TABLES = sorted((TESTS / "data").glob("*.json"))
TARGETS = (0.30, 0.25, 0.20, 0.1875, 0.15, 0.125, 0.10)


def test_the_four_tables_are_there() -> None:
    names = {path.stem for path in TABLES}
    assert names == {"bmshj2018-hyperprior", "mbt2018-mean", "mbt2018", "cheng2020-anchor"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_search_ends_in_the_window_within_12_evaluations(path: Path, target: float) -> None:
    table = Sensitivity.load(path)
    plan = make_plan(table, target)
    assert 1 <= len(plan.history) <= 12
    assert target - 0.01 <= plan.cr <= target
    # The knapsack may use the same bytes better, never worse.
    assert make_plan(table, target, planner="optimal").predicted <= plan.predicted + 1e-12


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_recorded_step_is_what_that_beta_leads_to(path: Path) -> None:
    table = Sensitivity.load(path)
    for beta, cr in make_plan(table, 0.1875).history:
        fewest = {
            site.name: min((b for b in table.bits if table.zeta[site.name][b] < beta), default=table.bits[-1])
            for site in table.sites
        }
        size = sum(site.params * fewest[site.name] for site in table.sites)
        assert cr == pytest.approx(size / sum(32 * site.params for site in table.sites), rel=1e-12)
