import itertools
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, OptimizeResult

from fmpq_fx.passes import planners
from fmpq_fx.passes.planners import PLANNERS, Assignment, adaptive, bits_at, optimal, uniform
from fmpq_fx.passes.tables import Table, monotone

Tables = tuple[Table, Table]  # zeta and cost
TARGETS = (0.30, 0.25, 0.20, 0.1875, 0.15, 0.125, 0.10)
BIT = 0.125  # bytes, the unit of nominal sizes

# Ties, zeros and values a little below zero, as measured and isotonic zeta has them, besides ordinary ones.
ZETA = st.one_of(
    st.sampled_from([0.0, 0.0, -1e-6, 1e-6, 0.01, 0.5]),
    st.floats(-6, 1).map(lambda exponent: 10**exponent),
)
PARAMS = st.sampled_from([1, 3, 17, 1000, 2359296])


@st.composite
def tables(draw: st.DrawFn, sites: int = 4) -> Tables:
    """Up to ``sites`` sites, each with its own widths; nominal costs or others that rise with the bits."""
    zeta: Table = {}
    cost: Table = {}
    for n in range(draw(st.integers(1, sites))):
        widths = sorted(draw(st.sets(st.integers(2, 10), min_size=1, max_size=4)))
        count = len(widths)
        falling = sorted(draw(st.lists(ZETA, min_size=count, max_size=count)), reverse=True)
        zeta[f"s{n}"] = dict(zip(widths, falling, strict=True))
        if draw(st.booleans()):
            params = draw(PARAMS)
            cost[f"s{n}"] = {b: params * b / 8 for b in widths}
        else:
            steps = draw(st.lists(st.integers(1, 5000), min_size=count, max_size=count))
            cost[f"s{n}"] = dict(zip(widths, map(float, itertools.accumulate(steps)), strict=True))
    return zeta, cost


def total(values: Mapping[str, Mapping[int, float]], bits: Mapping[str, int]) -> float:
    assert bits.keys() == values.keys()
    return math.fsum(values[site][b] for site, b in bits.items())


def every_plan(zeta: Table) -> Iterator[dict[str, int]]:
    for widths in itertools.product(*(zeta[site] for site in zeta)):
        yield dict(zip(zeta, widths, strict=True))


def every_size(zeta: Table, cost: Table) -> list[float]:
    return sorted({total(cost, bits) for bits in every_plan(zeta)})


def a_budget(data: st.DataObject, zeta: Table, cost: Table) -> float:
    """Draw the size of some plan, or one bit less or more, but not below the cheapest."""
    sizes = every_size(zeta, cost)
    return max(data.draw(st.sampled_from(sizes)) + data.draw(st.sampled_from([-BIT, 0, BIT])), sizes[0])


def naive_bits_at(zeta: Table, beta: float) -> dict[str, int]:
    return {site: min((b for b in v if v[b] < beta), default=max(v)) for site, v in zeta.items()}


def every_step(zeta: Table, cost: Table) -> list[float]:
    """Return the sizes that some beta leads to."""
    levels = {z for values in zeta.values() for z in values.values() if z > 0}
    return sorted({total(cost, naive_bits_at(zeta, beta)) for beta in (*levels, math.inf)})


def brute_force(zeta: Table, cost: Table, budget: float) -> float:
    return min(total(zeta, bits) for bits in every_plan(zeta) if total(cost, bits) <= budget)


def assert_optimal(zeta: Table, cost: Table, budget: float) -> None:
    bits = optimal(zeta, cost, budget).bits
    assert total(cost, bits) <= budget
    assert all(zeta[site][b] > zeta[site][now] for site, now in bits.items() for b in zeta[site] if b < now)
    spread = sum(max(v.values()) - min(v.values()) for v in zeta.values())
    best = brute_force(zeta, cost, budget)
    least = sum(min(v.values()) for v in zeta.values())
    assert total(zeta, bits) == pytest.approx(best, rel=0, abs=1e-11 * (best - least) + 1e-15 * spread)


def upgrades(zeta: Table, cost: Table, bits: dict[str, int], budget: float) -> list[float]:
    """How much zeta each single wider choice that fits the budget would save."""
    wider = [{**bits, site: b} for site in zeta for b in zeta[site] if b > bits[site]]
    return [total(zeta, bits) - total(zeta, w) for w in wider if total(cost, w) <= budget]


def realistic(seed: int, sites: int, noise: float) -> tuple[Table, Table, float]:
    """Log-linear zeta with measuring noise, made monotone; nominal costs; bytes of the float weights."""
    rng = np.random.default_rng(seed)
    params = np.exp(rng.uniform(np.log(3e3), np.log(2e6), sites)).astype(int).tolist()
    raw: Table = {}
    for n in range(sites):
        line = np.linspace(rng.uniform(-2, 1), rng.uniform(-6, -3), 9) + rng.normal(0, noise, 9)
        values = 10**line + rng.normal(0, 2e-5, 9)  # the second noise makes zeros and negative values
        raw[f"s{n}"] = dict(zip(range(2, 11), values.tolist(), strict=True))
    cost = {f"s{n}": {b: p * b / 8 for b in range(2, 11)} for n, p in enumerate(params)}
    return monotone(raw), cost, 4.0 * sum(params)


def small(params: tuple[int, ...] = (1, 3, 7)) -> Tables:
    """Three sites and 64 plans, few enough to try them all."""
    zeta = {f"s{n}": {2: 0.7 / (n + 1), 3: 0.2, 5: 0.2 - 1e-4 * n, 8: 1e-7} for n in range(3)}
    return zeta, {site: {b: p * b / 8 for b in zeta[site]} for site, p in zip(zeta, params, strict=True)}


# --- adaptive ---------------------------------------------------------------------------------------------


@given(tables(), st.floats(-1, 11))
@settings(deadline=None)
def test_bits_at_is_the_fewest_bits_below_the_tolerance(both: Tables, beta: float) -> None:
    zeta, _ = both
    levels = [z for values in zeta.values() for z in values.values()]
    for value in (beta, *levels):  # strictly below: exactly at a level the width does not qualify
        assert bits_at(zeta, value) == naive_bits_at(zeta, value)


@given(tables(), st.sampled_from([0, 0.001, 0.01, 0.1, 1]), st.data())
@settings(deadline=None, max_examples=300)
def test_adaptive_keeps_its_promises(both: Tables, share: float, data: st.DataObject) -> None:
    zeta, cost = both
    budget = a_budget(data, zeta, cost)
    window = share * budget
    found = adaptive(zeta, cost, budget, window=window)
    size = total(cost, found.bits)

    assert size <= budget
    in_window = [s for s in every_size(zeta, cost) if budget - window <= s <= budget]
    assert (size >= budget - window) == bool(in_window)
    if not in_window:
        assert upgrades(zeta, cost, found.bits, budget) == []
    assert 1 <= len(found.history) <= 12
    for beta, taken in found.history:
        assert beta > 0
        assert taken == total(cost, naive_bits_at(zeta, beta))
    if found.remarks:
        assert all(saved <= 0 for saved in upgrades(zeta, cost, found.bits, budget))
    else:
        assert found.beta is not None
        assert found.bits == naive_bits_at(zeta, found.beta)


@given(tables(), st.sampled_from([0, 0.01, 0.1]), st.data())
@settings(deadline=None)
def test_adaptive_finds_a_step_of_the_staircase_in_the_window(
    both: Tables, share: float, data: st.DataObject
) -> None:
    zeta, cost = both
    budget = data.draw(st.sampled_from(every_step(zeta, cost)))
    found = adaptive(zeta, cost, budget, window=share * budget)
    assert found.remarks == ""
    assert len({size for _, size in found.history}) == len(found.history)  # none was spent on a plan seen


@given(tables(), st.data())
@settings(deadline=None)
def test_adaptive_fills_up_the_largest_plan_that_it_saw(both: Tables, data: st.DataObject) -> None:
    zeta, cost = both
    found = adaptive(zeta, cost, a_budget(data, zeta, cost), window=0)
    if found.beta is not None:
        start = naive_bits_at(zeta, found.beta)
        seen = [size for _, size in found.history if size <= total(cost, found.bits)]
        assert total(cost, start) == max(seen)
        assert all(found.bits[site] >= start[site] for site in zeta)


@pytest.mark.parametrize("noise", [0, 0.2, 0.6])
@pytest.mark.parametrize("sites", [10, 40, 120])
def test_adaptive_on_realistic_tables(sites: int, noise: float) -> None:
    evaluations = []
    for seed in range(3):
        zeta, cost, float_bytes = realistic(seed, sites, noise)
        staircase = every_step(zeta, cost)
        for cr in TARGETS:
            found = adaptive(zeta, cost, cr * float_bytes, window=0.01 * float_bytes)
            assert cr - 0.01 <= total(cost, found.bits) / float_bytes <= cr
            steps = (size / float_bytes for size in staircase)
            assert (not found.remarks) == any(cr - 0.01 <= step <= cr for step in steps)
            evaluations.append(len(found.history))
    assert max(evaluations) <= 12
    assert sum(evaluations) / len(evaluations) < 5


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_adaptive_wastes_nothing_where_beta_changes_nothing(scale: float) -> None:
    """By steps of 5 alone, twelve evaluations from the start would not even reach such values."""
    zeta, cost, float_bytes = realistic(0, 60, 0.2)
    far = {site: {b: scale * z for b, z in values.items()} for site, values in zeta.items()}
    for cr in TARGETS:
        found = adaptive(far, cost, cr * float_bytes, window=0.01 * float_bytes)
        assert found.remarks == ""
        sizes = [size for _, size in found.history]
        assert len(sizes) == len(set(sizes))


def test_adaptive_steps_by_5_far_by_2_near_and_by_less_after_each_turn() -> None:
    zeta = {f"s{n}": {b: 10 * 1.03**n * 4.0 ** (2 - b) for b in range(2, 11)} for n in range(100)}
    cost = {site: {b: 100.0 * b for b in range(2, 11)} for site in zeta}
    float_bytes = 100 * 3200.0

    def factors(cr: float, window: float) -> list[float]:
        betas = [
            beta for beta, _ in adaptive(zeta, cost, cr * float_bytes, window=window * float_bytes).history
        ]
        assert betas[0] == 0.01
        return [after / before for before, after in itertools.pairwise(betas)]

    assert factors(0.125, 0.01) == pytest.approx([5, 5, 5, 5])
    assert factors(0.15, 0.01) == pytest.approx([5, 5, 5, 2])
    assert factors(0.30, 0.01) == pytest.approx([1 / 5])
    assert factors(0.25, 0.01) == pytest.approx([2, 2, 2**-0.5])
    assert factors(0.25, 0.002) == pytest.approx([5, 5**-0.5])
    assert factors(0.20, 0.002) == pytest.approx([5, 5, 2**-0.5, 2**0.25, 2**-0.125])


# One step of beta widens this site, and that is over the budgets below; so everything else is filled up.
STEP = ({2: 2.0, 3: 0.0}, {2: 10.0, 3: 60.0})


def test_adaptive_widens_past_a_plateau() -> None:
    zeta = {"step": STEP[0], "plateau": {2: 1.0, 3: 1.0, 4: 1.0, 5: 0.0}, "slope": {2: 0.5, 3: 0.45}}
    cost = {"step": STEP[1], "plateau": {2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, "slope": {2: 2.0, 3: 3.0}}
    assert adaptive(zeta, cost, 17.0, window=1.0).bits == {"step": 2, "plateau": 5, "slope": 2}


def test_adaptive_fills_up_with_what_buys_the_most_per_byte() -> None:
    zeta = {"step": STEP[0], "much": {2: 1.0, 3: 0.0}, "a": {2: 0.5, 3: 0.0}, "b": {2: 0.5, 3: 0.05}}
    cost = {"step": STEP[1], "much": {2: 2.0, 3: 12.0}, "a": {2: 2.0, 3: 4.0}, "b": {2: 2.0, 3: 4.0}}
    for budget, window, b in ((18.0, 0.0, 2), (20.0, 0.0, 3), (26.0, 6.0, 3)):
        found = adaptive(zeta, cost, budget, window=window)
        assert found.bits == {"step": 2, "much": 2, "a": 3, "b": b}


def test_adaptive_makes_upgrades_that_buy_nothing_only_up_to_the_window() -> None:
    zeta = {f"s{n}": {2: 0.0, 3: 0.0} for n in range(10)} | {"useful": {2: 1e-3, 3: 0.0}}
    cost = {site: {2: 2.0, 3: 3.0} for site in zeta}
    found = adaptive(zeta, cost, 31.0, window=5.0)  # the widest plan of the staircase takes 23 bytes
    assert found.bits["useful"] == 3
    assert total(cost, found.bits) == 26
    assert "staircase" in found.remarks


def test_adaptive_gives_bits_back_where_only_that_reaches_the_window() -> None:
    zeta = {"large": {2: 1e-3, 4: 0.0}, "small": {2: 1.0, 10: 0.0}}
    cost = {"large": {2: 20.0, 4: 40.0}, "small": {2: 2.0, 10: 10.0}}
    found = adaptive(zeta, cost, 42.0, window=1.0)
    assert found.bits == {"large": 4, "small": 2}  # beta leads to 30 bytes, and no upgrade of that fits
    assert found.beta is None
    assert "least zeta" in found.remarks


def test_adaptive_says_where_no_plan_lands_in_the_window() -> None:
    found = adaptive({"a": {2: 1.0, 3: 0.0}}, {"a": {2: 200.0, 3: 300.0}}, 290.0, window=10.0)
    assert found.bits == {"a": 2}
    assert "between 280 and 290 bytes. No plan does; this one takes 200 bytes" in found.remarks


def test_adaptive_obeys_a_smaller_number_of_evaluations() -> None:
    zeta, cost, float_bytes = realistic(0, 40, 0.2)
    found = adaptive(zeta, cost, 0.3 * float_bytes, window=0.01 * float_bytes, max_evaluations=1)
    assert len(found.history) == 1
    assert 0.29 <= total(cost, found.bits) / float_bytes <= 0.3


def test_adaptive_starts_from_the_cheapest_plan_where_none_fitted() -> None:
    zeta = {"a": {2: 50.0, 3: 40.0, 4: 0.0}}
    cost = {"a": {2: 2.0, 3: 3.0, 4: 4.0}}
    found = adaptive(zeta, cost, 3.0, window=0.0, max_evaluations=1)
    assert (found.bits, found.beta, found.history) == ({"a": 3}, None, ((0.01, 4.0),))


# --- optimal ----------------------------------------------------------------------------------------------


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


# --- uniform, and what all have in common ------------------------------------------------------------------


@given(tables(), st.data())
@settings(deadline=None)
def test_uniform_is_the_largest_width_that_fits(both: Tables, data: st.DataObject) -> None:
    zeta, cost = both
    budget = a_budget(data, zeta, cost)

    def at(width: int) -> dict[str, int]:
        return {s: max([b for b in v if b <= width] or [min(v)]) for s, v in zeta.items()}

    found = uniform(zeta, cost, budget)
    fitting = [at(width) for width in range(2, 11) if total(cost, at(width)) <= budget]
    assert found == Assignment(fitting[-1])


def test_uniform_leaves_fixed_sites_as_they_are() -> None:
    zeta = {"a": {2: 1.0, 4: 0.5, 8: 0.0}, "wide": {32: 0.0}, "odd": {5: 0.0}}
    cost = {"a": {2: 2.0, 4: 4.0, 8: 8.0}, "wide": {32: 32.0}, "odd": {5: 5.0}}
    assert uniform(zeta, cost, 44.0).bits == {"a": 4, "wide": 32, "odd": 5}
    zeta, cost = (
        {"a": {2: 1.0, 3: 0.0}, "b": {4: 1.0, 10: 0.0}},
        {"a": {2: 2.0, 3: 3.0}, "b": {4: 4.0, 10: 10.0}},
    )
    assert uniform(zeta, cost, 7.0).bits == {"a": 3, "b": 4}


@pytest.mark.parametrize("planner", ["adaptive", "optimal", "uniform"])
class TestAll:
    @staticmethod
    def run(planner: str, zeta: Table, cost: Table, budget: float) -> Assignment:
        return PLANNERS[planner](
            zeta, cost, budget, **({"window": 0.01 * budget} if planner == "adaptive" else {})
        )

    def test_one_candidate_per_site_is_no_choice(self, planner: str) -> None:
        zeta, cost = {"a": {8: 0.5}, "b": {32: 0.0}}, {"a": {8: 8.0}, "b": {32: 32.0}}
        for budget in (40.0, 41.0):
            assert self.run(planner, zeta, cost, budget).bits == {"a": 8, "b": 32}

    def test_the_cheapest_plan_fits_exactly(self, planner: str) -> None:
        zeta, cost = {"a": {2: 0.5, 3: 0.0}}, {"a": {2: 2.0, 3: 3.0}}
        assert self.run(planner, zeta, cost, 2.0).bits == {"a": 2}

    @pytest.mark.parametrize("budget", [1.875, 0.0, -5.0, math.nan])
    def test_even_the_cheapest_plan_is_over_the_budget(self, planner: str, budget: float) -> None:
        zeta, cost = {"a": {2: 0.5, 3: 0.0}}, {"a": {2: 2.0, 3: 3.0}}
        with pytest.raises(ValueError, match="even the cheapest plan takes 2 bytes"):
            self.run(planner, zeta, cost, budget)

    @pytest.mark.parametrize(
        ("zeta", "cost"),
        [
            ({}, {}),
            ({"a": {}}, {"a": {}}),
            ({"a": {2: 0.0}}, {"b": {2: 2.0}}),
            ({"a": {2: 0.0, 3: 0.0}}, {"a": {2: 2.0}}),
        ],
    )
    def test_the_tables_are_of_different_things(self, planner: str, zeta: Table, cost: Table) -> None:
        with pytest.raises(ValueError, match="not of the same sites and bit-widths"):
            self.run(planner, zeta, cost, 10.0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_value_is_not_finite(self, planner: str, value: float) -> None:
        with pytest.raises(ValueError, match=r"site 'a' at 2 bits: zeta (nan|inf), cost 2\.0 bytes"):
            self.run(planner, {"a": {2: value, 3: 0.0}}, {"a": {2: 2.0, 3: 3.0}}, 10.0)

    def test_does_not_change_the_tables(self, planner: str) -> None:
        zeta, cost, float_bytes = realistic(6, 10, 0.2)
        before = repr((zeta, cost))
        self.run(planner, zeta, cost, 0.2 * float_bytes)
        assert repr((zeta, cost)) == before
