"""Plans: targets, budgets, candidates, and what cannot be planned."""

import dataclasses
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmpq_fx.passes.plan.inputs import InputGrid
from fmpq_fx.passes.plan.planners import PLANNERS, optimal
from fmpq_fx.passes.plan.tables import Plan, total_bytes
from fmpq_fx.passes.plan.task import make_plan
from support.sensitivities import PARAMS, sensitivity

# --- targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("target", [0.30, 0.25, 0.20, 0.1875, 0.15, 0.125, 0.10])
def test_the_size_is_at_most_the_target_and_counts_all_sites(planner: str, target: float) -> None:
    plan = make_plan(sensitivity(), target, planner=planner)
    taken = sum(PARAMS[site] * bits / 8 for site, bits in plan.bits.items() if bits is not None)
    assert plan.cr == taken / (4 * sum(PARAMS.values()))
    assert plan.cr <= plan.target_cr == target
    assert list(plan.bits) == list(PARAMS)
    assert plan.planner == planner


@pytest.mark.parametrize("target", [0.30, 0.25, 0.20, 0.1875, 0.15, 0.125, 0.10])
def test_the_adaptive_search_ends_within_a_hundredth_of_the_target(target: float) -> None:
    plan = make_plan(sensitivity(), target)
    assert target - 0.01 <= plan.cr
    assert 1 <= len(plan.history) <= 12
    if not plan.remarks:
        assert plan.history[-1] == (plan.beta, plan.cr)


def test_history_is_in_cr_over_all_sites() -> None:
    """Fixed and float sites are part of the size, or the CR of an evaluation would not be that of its plan."""
    table = sensitivity()
    plan = make_plan(table, 0.34, fixed={"g_a.2": 12, "g_s.6": None})
    for beta, cr in plan.history:
        bits: dict[str, int | None] = {
            site: min((b for b, z in table.zeta[site].items() if z < beta), default=10) for site in PARAMS
        }
        bits |= {"g_a.2": 12, "g_s.6": None}
        assert cr == pytest.approx(total_bytes(table.sites, bits) / plan.float_bytes, rel=1e-12)


@pytest.mark.parametrize(
    ("factor", "fraction"), [(4, 0.25), (4.0, 0.25), (np.float32(8), 0.125), (3.2, 0.3125)]
)
def test_a_target_above_one_is_a_factor(factor: float, fraction: float) -> None:
    plan = make_plan(sensitivity(), factor)
    assert plan.target_cr == fraction
    assert plan == make_plan(sensitivity(), fraction)


@pytest.mark.parametrize("bits", range(2, 11))
def test_a_target_of_whole_bits_leaves_room_for_them(bits: int) -> None:
    """1 / (32 / 6) and its like are a rounding error off: no reason to give every site a bit less."""
    for target in (bits / 32, 32 / bits, 1 / (32 / bits), math.nextafter(bits / 32, 0), 1 - (1 - bits / 32)):
        plan = make_plan(sensitivity(), target, planner="uniform")
        assert set(plan.bits.values()) == {bits}
        assert plan.target_cr == bits / 32


@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=50)
def test_the_size_of_any_plan_is_a_target_that_leads_to_it(counts: list[int], data: st.DataObject) -> None:
    table = sensitivity({f"s{n}": count for n, count in enumerate(counts)}, range(2, 6))
    bits: dict[str, int | None] = {site.name: data.draw(st.integers(2, 5)) for site in table.sites}
    size = total_bytes(table.sites, bits)
    cr = size / total_bytes(table.sites, dict.fromkeys(bits))
    for target in (cr, 1 / cr):
        plan = make_plan(table, target, planner="optimal")
        costs = {site.name: {b: site.bytes_at(b) for b in range(2, 6)} for site in table.sites}
        assert plan.bits == optimal(table.zeta, costs, size).bits
        assert plan.cr <= plan.target_cr


@pytest.mark.parametrize("target", [math.nan, math.inf, -math.inf, 0, -0.25, -4])
def test_a_target_that_is_no_size(target: float) -> None:
    with pytest.raises(ValueError, match=r"target_cr is .*; pass a fraction .* such as 0\.25, or a factor"):
        make_plan(sensitivity(), target)


@pytest.mark.parametrize("target", [True, np.True_, "4", None, 1j, [0.25], b"4"])
def test_a_target_that_is_no_number(target: Any) -> None:
    with pytest.raises(TypeError, match=r"target_cr is .* of type .*; pass a fraction"):
        make_plan(sensitivity(), target)


@pytest.mark.parametrize("planner", PLANNERS)
class TestUnreachable:
    def test_a_reduction_was_given_for_a_ratio(self, planner: str) -> None:
        with pytest.raises(ValueError, match="cannot be reached") as caught:
            make_plan(sensitivity(), 0.75, planner=planner)
        assert str(caught.value) == (
            "target_cr 0.75 cannot be reached: with candidates of 2, 3, 4, 5, 6, 7, 8, 9, 10 bits, CR is in "
            "[0.0625, 0.3125] (factors 3.2 to 16.0); pass a target_cr in there: for a 75 % reduction pass 0.25"
        )

    @pytest.mark.parametrize("target", [0.7, 0.9, 0.8125])
    def test_the_reduction_is_in_plain_numbers(self, planner: str, target: float) -> None:
        with pytest.raises(ValueError, match=f"for a {100 * target:g} % reduction pass {1 - target:g}$"):
            make_plan(sensitivity(), target, planner=planner)

    @pytest.mark.parametrize("more", [0.32, 0.5, 0.6, 1, 1.0, 1.2, 2, 3.1])
    @pytest.mark.parametrize("fewer", [0.06, 0.01, 17])
    def test_too_large_and_too_small(self, planner: str, more: float, fewer: float) -> None:
        for target, advice in ((more, "more"), (fewer, "fewer")):
            with pytest.raises(
                ValueError, match=rf"in \[0\.0625, 0\.3125\].*in there, or allow {advice} bits$"
            ):
                make_plan(sensitivity(), target, planner=planner)

    def test_a_factor_is_named_as_one(self, planner: str) -> None:
        with pytest.raises(ValueError, match=r"target_cr 75 \(a factor, CR 0\.01333\) cannot be reached"):
            make_plan(sensitivity(), 75, planner=planner)

    def test_the_ends_are_reached(self, planner: str) -> None:
        assert set(make_plan(sensitivity(), 0.0625, planner=planner).bits.values()) == {2}
        largest = make_plan(sensitivity(), 0.3125, planner=planner)
        assert largest.cr > 0.3025 if planner == "adaptive" else largest.cr == 0.3125

    def test_candidates_and_fixed_sites_move_the_interval(self, planner: str) -> None:
        fixed = {"g_a.2": 8, "g_s.6": None}
        with pytest.raises(ValueError, match="candidates of 4, 6 bits and 2 of 6 sites fixed, CR is in"):
            make_plan(sensitivity(), 0.05, planner=planner, bits=(6, 4), fixed=fixed)


@given(
    st.lists(st.integers(1, 3_000_000), min_size=1, max_size=5),
    st.sets(st.integers(2, 10), min_size=1),
    st.lists(st.sampled_from([2, 7, 16, None]), max_size=5),
)
@settings(deadline=None, max_examples=50)
def test_what_the_message_names_can_be_passed(
    counts: list[int], bits: set[int], fix: list[int | None]
) -> None:
    table = sensitivity({f"s{n}": count for n, count in enumerate(counts)})
    fixed = {f"s{n}": width for n, width in enumerate(fix[: len(counts)])}
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        make_plan(table, 0.001, bits=bits, fixed=fixed)
    ends = re.search(r"\[(\S+), (\S+)\] \(factors (\S+) to (\S+)\)", str(caught.value))
    assert ends
    for end in map(float, ends.groups()):
        make_plan(table, end, planner="uniform", bits=bits, fixed=fixed)


# --- candidates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [[4, 8], (8, 4, 4), {4, 8}, iter([8, 4]), np.array([4, 8]), [4.0, 8]])
def test_only_the_candidates_are_used(bits: Any) -> None:
    plan = make_plan(sensitivity(), 0.2, bits=bits)
    assert set(plan.bits.values()) == {4, 8}
    assert all(type(b) is int for b in plan.bits.values())
    assert plan == make_plan(sensitivity(), 0.2, bits=[4, 8])


def test_without_candidates_all_that_were_measured_are() -> None:
    table = sensitivity(widths=range(3, 6))
    assert make_plan(table, 0.12) == make_plan(table, 0.12, bits=[3, 4, 5])


@pytest.mark.parametrize(
    ("bits", "error", "text"),
    [
        (
            range(8, 13),
            ValueError,
            "bits has [11, 12], and only [2, 3, 4, 5, 6, 7, 8, 9, 10] were measured; pass",
        ),
        ([2.5], ValueError, "bits has [2.5], and only"),
        ("48", ValueError, "bits has ['4', '8'], and only"),
        ([], ValueError, "bits has no width in it; pass some of [2, 3, 4, 5, 6, 7, 8, 9, 10]"),
        (8, TypeError, "bits is 8; pass several widths, such as range(2, 9), or [8] for one"),
    ],
)
def test_candidates_that_cannot_be(bits: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        make_plan(sensitivity(), 0.25, bits=bits)


def test_how_to_measure_other_candidates() -> None:
    with pytest.raises(ValueError, match=r"or measure again with analyze\(model, bits=\.\.\.\)$"):
        make_plan(sensitivity(), 0.25, bits=[12])


def test_planners_see_monotone_zeta() -> None:
    """Measured zeta may dip; believed, the dip at 3 bits would be worth more than the other site's fall."""
    table = sensitivity({"dips": 100, "falls": 100}, range(2, 5))
    table.rate["dips"].update({2: 0.3, 3: 0.0, 4: 0.3})
    table.rate["falls"].update({2: 0.2, 3: 0.0, 4: 0.0})
    assert make_plan(table, 5 / 64, planner="optimal").bits == {"dips": 2, "falls": 3}


# --- the other arguments, and the plan ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 16, np.int64(8), None])
def test_activation_bits(bits: int | None) -> None:
    plan = make_plan(sensitivity(), 0.25, activation_bits=bits)
    assert plan.activation_bits == dict.fromkeys(plan.bits, bits)
    assert plan.bits == make_plan(sensitivity(), 0.25).bits
    assert Plan.from_json(plan.to_json()) == plan


def test_activation_bits_of_single_sites() -> None:
    names = [site.name for site in sensitivity().sites]
    asked: dict[str, int | None] = {"*": 6, names[-1]: None, names[0]: 12}
    plan = make_plan(sensitivity(), 0.25, activation_bits=asked)
    assert plan.activation_bits == {**dict.fromkeys(names, 6), names[0]: 12, names[-1]: None}
    # What is not named is for calibration to choose, and has 8 bits until then; so it is without any.
    assert make_plan(sensitivity(), 0.25, activation_bits={names[0]: 12}).activation_bits == {
        **dict.fromkeys(names, 8),
        names[0]: 12,
    }
    assert make_plan(sensitivity(), 0.25).activation_bits == dict.fromkeys(names, 8)
    with pytest.raises(ValueError, match="activation_bits has 'nowhere', which matches none"):
        make_plan(sensitivity(), 0.25, activation_bits={"nowhere": 8})
    with pytest.raises(ValueError, match="pass 'mixed', a whole number, None, or a mapping"):
        make_plan(sensitivity(), 0.25, activation_bits="8")


def test_a_plan_of_an_older_version_is_read() -> None:
    plan = make_plan(sensitivity(), 0.25, activation_bits=8)
    first, *others = plan.bits
    plan = dataclasses.replace(
        plan, inputs={name: InputGrid(-1.5, 2.0, name == first) for name in (first, *others)}
    )
    fields = json.loads(plan.to_json())
    del fields["inputs"], fields["macs"]
    fields |= {
        "activation_bits": 8,
        "ranges": {name: [-1.5, 2.0] for name in plan.bits},
        "integral": [first],
    }
    assert Plan.from_json(json.dumps(fields)) == plan


@pytest.mark.parametrize("bits", [1, 17, 0, 8.0, True])
def test_activation_bits_out_of_range(bits: Any) -> None:
    text = f"activation_bits is {bits!r}; pass a whole number from 2 to 16, or None to keep activations float"
    with pytest.raises(ValueError, match=re.escape(text)):
        make_plan(sensitivity(), 0.25, activation_bits=bits)


def test_an_unknown_planner() -> None:
    with pytest.raises(ValueError, match="no planner 'greedy'; pass one of 'adaptive', 'optimal', 'uniform'"):
        make_plan(sensitivity(), 0.25, planner="greedy")
