"""The knapsack against brute force, and what it does where HiGHS is at its limits."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmpq_fx.passes.plan import knapsack
from fmpq_fx.passes.plan.planners import adaptive, optimal, uniform
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
    upgrades,
)


@given(tables(), st.data())
@settings(deadline=None, max_examples=150)
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


@pytest.mark.parametrize("spare", [21, 22, 24])
def test_optimal_resolves_what_buying_the_most_per_byte_misses(spare: int) -> None:
    """That ends at a zeta of 1.0 here; within 1e-12 of it, the optimum of 3e-7 has many neighbours."""
    zeta = {"large": {2: 1.0, 3: 0.5, 10: 0.0}, "bait": {2: 3e-7, 3: 0.0}}
    zeta |= {f"s{n}": {2: 1e-13 * (n + 1), 3: 0.0} for n in range(9)}
    cost = {"large": {2: 1e6, 3: 5e6, 10: 5e6 + 1}} | {s: {2: 2.0, 3: 3.0} for s in zeta if s != "large"}
    cost["bait"][3] = 2 + 1.125
    bits = optimal(zeta, cost, 5e6 + spare).bits
    assert total(zeta, bits) == pytest.approx(brute_force(zeta, cost, 5e6 + spare), rel=1e-12)


def test_optimal_never_trusts_a_tolerance() -> None:
    """Many plans are a few bytes of 1.4e9 above the budget, which the solver takes for within it."""
    zeta = {"large": {2: 1.0, 3: 0.2, 4: 0.0}, "small": {2: 0.1, 3: 0.0}}
    cost = {"large": {2: 1.0, 3: 1e9 - 4.0, 4: 1e9 + 0.5}, "small": {2: 1.0, 3: 2.0}}
    zeta |= {f"s{n}": {2: 0.01 * (n + 1), 3: 0.0} for n in range(8)}
    cost |= {f"s{n}": {2: 1.0, 3: 1e8 + n} for n in range(8)}
    budget = 1e9 + 4e8 + 9
    assert_optimal(zeta, cost, budget)
    assert optimal(zeta, cost, budget).remarks == ""


def test_planners_say_when_the_solver_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size exactly on the budget is a subset-sum problem, for which HiGHS may take for ever."""
    monkeypatch.setattr(knapsack, "milp", lambda *_, **__: SimpleNamespace(x=None, status=1))
    zeta, cost, float_bytes = realistic(6, 10, 0.2)
    budget = 0.2 * float_bytes
    found = adaptive(zeta, cost, budget, window=0.0)
    assert "No plan was found that does" in found.remarks
    assert total(cost, found.bits) <= budget
    found = optimal(zeta, cost, budget)
    assert found.remarks == "It was not proven that no plan has less zeta."
    assert total(cost, found.bits) <= budget
    assert max(upgrades(zeta, cost, found.bits, budget)) <= 0, (
        "what buys the most zeta per byte was not bought"
    )


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
    """Against bounds of the Lagrangian relaxation, which hold for every multiplier."""
    zeta, cost, float_bytes = realistic(5, 120, 0.2)
    budget = 0.1875 * float_bytes
    found = optimal(zeta, cost, budget)
    z, c = (np.array([list(values.values()) for values in table.values()]) for table in (zeta, cost))
    best = max(
        float((z + multiplier * c).min(1).sum() - multiplier * budget)
        for multiplier in np.logspace(-12, -4, 801)
    )
    assert total(cost, found.bits) <= budget
    assert best <= total(zeta, found.bits) <= 1.01 * best
