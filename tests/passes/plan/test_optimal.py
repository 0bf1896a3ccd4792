"""The knapsack against brute force, and what it does where HiGHS is at its limits."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, OptimizeResult

from fmpq_fx.passes.plan import planners
from fmpq_fx.passes.plan.planners import Assignment, adaptive, optimal, uniform
from support.planner_tables import (
    BIT,
    TARGETS,
    Tables,
    a_budget,
    assert_optimal,
    brute_force,
    every_size,
    realistic,
    small,
    tables,
    total,
)


@given(tables(), st.data())
@settings(deadline=None, max_examples=300)
def test_optimal_is_the_best_of_all_plans(both: Tables, data: st.DataObject) -> None:
    assert_optimal(*both, a_budget(data, *both))


@pytest.mark.parametrize("params", [(1, 3, 7), (2359296, 1, 17)])
def test_optimal_at_every_budget_boundary(params: tuple[int, ...]) -> None:
    zeta, cost = small(params)
    sizes = every_size(zeta, cost)
    for budget in {size + offset for size in sizes for offset in (-BIT, 0.0, BIT)}:
        if budget >= sizes[0]:
            assert_optimal(zeta, cost, budget)


@pytest.mark.parametrize("exponent", [-60, -30, 0, 30])
def test_optimal_does_not_depend_on_the_unit_of_zeta(exponent: int) -> None:
    """Unscaled, HiGHS would take any plan for optimal whose zeta is below its absolute gap of 1e-6."""
    zeta, cost, float_bytes = realistic(2, 12, 0.2)
    other = {site: {b: z * 2.0**exponent for b, z in values.items()} for site, values in zeta.items()}
    for cr in (0.125, 0.25, 0.30):
        assert optimal(other, cost, cr * float_bytes).bits == optimal(zeta, cost, cr * float_bytes).bits


def test_optimal_resolves_small_differences_beside_large_values() -> None:
    """The gap to beat is 1e-14 of the zeta that the narrowest widths would cost."""
    zeta = {f"s{n}": {2: 100.0, 8: 1e-11 * (1.1**n), 9: 0.0} for n in range(8)}
    cost = {site: {2: 2.0, 8: 8.0, 9: 9.0} for site in zeta}
    found = optimal(zeta, cost, 8 * 8.0 + 3)
    assert found.bits == {f"s{n}": 9 if n >= 5 else 8 for n in range(8)}


def test_optimal_is_proven_in_a_unit_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buying the most zeta per byte ends at 1.0 here, and 1e-6 of that would hide the optimum of 3e-7."""
    zeta = {"large": {2: 1.0, 3: 0.5, 10: 0.0}, "bait": {2: 3e-7, 3: 0.0}}
    zeta |= {f"s{n}": {2: 1e-13 * (n + 1), 3: 0.0} for n in range(9)}
    cost = {"large": {2: 1e6, 3: 5e6, 10: 5e6 + 1}} | {s: {2: 2.0, 3: 3.0} for s in zeta if s != "large"}
    cost["bait"][3] = 2 + 1.125
    solve, calls = planners.milp, []

    def spy(objective: np.ndarray, **others: Any) -> OptimizeResult:
        result = solve(objective, **others)
        calls.append((objective.max(), result.fun))
        return result

    monkeypatch.setattr(planners, "milp", spy)
    for budget in (5e6 + 21, 5e6 + 22, 5e6 + 24):
        bits = optimal(zeta, cost, budget).bits
        assert total(zeta, bits) == pytest.approx(brute_force(zeta, cost, budget), rel=1e-12)
        largest, optimum = calls[-1]
        assert optimum == pytest.approx(1e6)
        assert largest <= optimum


def test_optimal_never_trusts_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that takes a plan a little above the budget for one within it is asked again."""
    solve, over = planners.milp, 0

    def lax(objective: np.ndarray, *, constraints: list[Any], **rest: Any) -> OptimizeResult:
        nonlocal over
        sites, size, *cuts = constraints
        wider = LinearConstraint(size.A, size.lb, 1.5 * size.ub)
        result = solve(objective, constraints=[sites, wider, *cuts], **rest)
        over += (size.A @ result.x > size.ub + 1).item()
        return result

    monkeypatch.setattr(planners, "milp", lax)
    zeta, cost = small()
    sizes = every_size(zeta, cost)
    for budget in sizes:
        assert_optimal(zeta, cost, budget)
    assert over > len(sizes) / 2


def test_planners_say_when_the_solver_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size exactly on the budget is a subset-sum problem, for which HiGHS has no time limit of its own."""
    monkeypatch.setattr(planners, "MAX_NODES", 1)
    zeta, cost, float_bytes = realistic(6, 10, 0.2)
    budget = 0.2 * float_bytes
    found = adaptive(zeta, cost, budget, window=0.0)
    assert "No plan was found that does" in found.remarks
    assert total(cost, found.bits) <= budget
    proportional = {site: {b: 1 - 1e-8 * size for b, size in sizes.items()} for site, sizes in cost.items()}
    found = optimal(proportional, cost, budget)
    assert found.remarks == "It was not proven that no plan has less zeta."
    assert total(cost, found.bits) <= budget


def test_optimal_falls_back_on_what_buys_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "milp", lambda *_, **__: SimpleNamespace(x=None, status=4))
    found = optimal({"a": {2: 1.0, 3: 0.5, 4: 0.0}}, {"a": {2: 2.0, 3: 3.0, 4: 4.0}}, 3.0)
    assert found == Assignment({"a": 3}, remarks="It was not proven that no plan has less zeta.")


def test_optimal_prefers_the_cheaper_of_equal_widths() -> None:
    """Also where what buys the most per byte, the bait, is not the optimum, so that HiGHS decides."""
    plateaus = {f"s{n}": {2: 1.0, 3: 0.0, 4: 0.0, 5: 0.0} for n in range(9)}
    zeta = plateaus | {"large": {2: 1.0, 3: 0.0}, "bait": {2: 0.6, 3: 0.0}, "none": {2: 0.0, 8: 0.0}}
    cost = {site: {b: float(b) for b in range(2, 9)} for site in zeta} | {"large": {2: 2.0, 3: 102.0}}
    cost = {site: {b: cost[site][b] for b in zeta[site]} for site in zeta} | {"bait": {2: 2.0, 3: 52.0}}
    expected = dict.fromkeys(plateaus, 3) | {"large": 3, "bait": 2, "none": 2}
    cheapest = 2.0 * len(zeta)
    assert optimal(zeta, cost, cheapest + len(plateaus) + 100 + 40).bits == expected


@pytest.mark.parametrize("cr", TARGETS)
def test_optimal_beats_the_others_on_realistic_tables(cr: float) -> None:
    zeta, cost, float_bytes = realistic(4, 40, 0.2)
    budget = cr * float_bytes
    best, searched, same = (
        total(zeta, found.bits)
        for found in (
            optimal(zeta, cost, budget),
            adaptive(zeta, cost, budget, window=0.01 * float_bytes),
            uniform(zeta, cost, budget),
        )
    )
    assert best <= searched
    assert best < same


def test_optimal_solves_the_largest_tables() -> None:
    """Against the bound of the Lagrangian relaxation, at the multiplier that is best for it."""
    zeta, cost, float_bytes = realistic(5, 120, 0.2)
    budget = 0.1875 * float_bytes
    found = optimal(zeta, cost, budget)

    def bound(multiplier: float) -> float:
        priced = (min(zeta[s][b] + multiplier * cost[s][b] for b in zeta[s]) for s in zeta)
        return sum(priced) - multiplier * budget

    best = max(bound(10**exponent) for exponent in np.linspace(-12, -4, 4001))
    assert total(cost, found.bits) <= budget
    assert best <= total(zeta, found.bits) <= 1.01 * best
