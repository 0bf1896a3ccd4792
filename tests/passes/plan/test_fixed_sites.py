"""Sites whose bits are given."""

import math
import re
from typing import Any

import pytest

from fmpq_fx.passes.plan.planners import PLANNERS
from fmpq_fx.passes.plan.task import make_plan
from support.sensitivities import sensitivity


@pytest.mark.parametrize("planner", PLANNERS)
def test_fixed_sites_keep_their_width(planner: str) -> None:
    fixed = {"g_a.0": None, "g_a.1": 3, "h_s.4": 16}
    plan = make_plan(sensitivity(), 0.25, planner=planner, fixed=fixed)
    assert {site: plan.bits[site] for site in fixed} == fixed
    assert plan.cr <= 0.25
    assert plan.zeta_of("g_a.0") == 0
    assert math.isnan(plan.zeta_of("h_s.4"))  # allowed, though 16 bits were not measured


def test_what_fixed_sites_take_is_not_there_for_the_others() -> None:
    plan = make_plan(sensitivity({"a": 100, "b": 100}), 0.5625, planner="uniform", fixed={"a": None})
    assert plan.bits == {"a": None, "b": 4}  # 32 + 4 of 64 bits
    plan = make_plan(sensitivity({"a": 100, "b": 100}), 0.25, planner="optimal", fixed={"a": 12})
    assert plan.bits == {"a": 12, "b": 4}


def test_globs_and_names() -> None:
    plan = make_plan(sensitivity(), 0.25, fixed={"h_?.*": 4, "g_a.[01]": 6})
    assert {site for site, b in plan.bits.items() if b == 4} >= {"h_a.0", "h_s.4"}
    assert (plan.bits["g_a.0"], plan.bits["g_a.1"]) == (6, 6)


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [
        ({"g_a.*": 4, "g_*": 6}, (6, 6)),  # a later glob wins
        ({"g_*": 6, "g_a.*": 4}, (4, 4)),
        ({"g_a.0": 3, "g_*": 6}, (3, 6)),  # a name wins over a glob, wherever it stands
        ({"g_*": 6, "g_a.0": None}, (None, 6)),
        ({"g_*": None, "g_a.0": 3}, (3, None)),
    ],
)
def test_which_of_two_keys_wins(fixed: dict[str, int | None], expected: tuple[int | None, ...]) -> None:
    plan = make_plan(sensitivity({"g_a.0": 100, "g_a.1": 100, "h_a.0": 100_000}), 0.25, fixed=fixed)
    assert (plan.bits["g_a.0"], plan.bits["g_a.1"]) == expected


def test_a_name_with_characters_of_a_glob_is_a_name() -> None:
    table = sensitivity({"a[0]": 100, "a0": 100})
    assert make_plan(table, 0.25, planner="optimal", fixed={"a[0]": 12}).bits == {"a[0]": 12, "a0": 4}


def test_all_sites_fixed() -> None:
    for planner in PLANNERS:
        plan = make_plan(sensitivity(), 0.25, planner=planner, fixed={"*": 8})
        assert set(plan.bits.values()) == {8}
    with pytest.raises(ValueError, match=r"CR is in \[0\.25, 0\.25\]"):
        make_plan(sensitivity(), 0.26, fixed={"*": 8})


@pytest.mark.parametrize(("key", "near"), [("g_s.5", "'g_s.6'"), ("g_q.0", "'g_a.0'"), ("h_z.*", "'h_s.4'")])
def test_a_fixed_site_that_is_not_there(key: str, near: str) -> None:
    text = f"fixed has '{key}', which matches none of the 6 sites; did you mean "
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        make_plan(sensitivity(), 0.25, fixed={key: 8})
    assert near in str(caught.value)
    assert "[site.name for site in analyze(model).sites] lists them all" in str(caught.value)


def test_a_fixed_site_like_no_other() -> None:
    with pytest.raises(ValueError, match=r"matches none of the 6 sites; \[site\.name for"):
        make_plan(sensitivity(), 0.25, fixed={"entropy": 8})


@pytest.mark.parametrize("width", [1, 17, 0, -8, 32, 8.0, True, "8", math.nan])
def test_a_fixed_width_out_of_range(width: Any) -> None:
    text = f"fixed['g_a.0'] is {width!r}; pass a whole number from 2 to 16, or None to keep the site float32"
    with pytest.raises(ValueError, match=re.escape(text)):
        make_plan(sensitivity(), 0.25, fixed={"g_a.0": width})


@pytest.mark.parametrize("fixed", [["g_a.0"], "g_a.0", 8])
def test_fixed_is_no_mapping(fixed: Any) -> None:
    with pytest.raises(TypeError, match=r"fixed is .*; pass a mapping of site names or globs to bits"):
        make_plan(sensitivity(), 0.25, fixed=fixed)
