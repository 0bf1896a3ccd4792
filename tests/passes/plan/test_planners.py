"""The adaptive and the uniform planner, and what all planners have in common."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmpq_fx.passes.plan.planners import PLANNERS, Assignment, adaptive, bits_at, uniform
from fmpq_fx.passes.plan.tables import Table
from support.planner_tables import (
    TARGETS,
    Tables,
    a_budget,
    every_size,
    every_step,
    naive_bits_at,
    realistic,
    tables,
    total,
    upgrades,
)


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
