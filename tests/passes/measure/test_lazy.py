"""Plans from as few measurements as decide them, against plans from tables that were measured in full."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fmpq_fx
from fmpq_fx import FmpqError, Plan, Sensitivity
from fmpq_fx.passes.plan.interpolation import interpolated
from fmpq_fx.passes.plan.tables import Table
from fmpq_fx.passes.plan.task import make_plan
from support import TESTS
from support.counted import lazy_plan
from support.small_models import small_model

DATA = TESTS / "data"
TRAINED = ("bmshj2018-hyperprior", "mbt2018-mean")
TARGETS = (0.1875, 0.15, 0.14, 0.125, 0.11, 0.10)


def table_of(name: str) -> Sensitivity:
    return Sensitivity.load(DATA / f"{name}.json")


def zeta_of(table: Sensitivity, plan: Plan) -> float:
    """Sum zeta of the full table over the bits of ``plan``."""
    return math.fsum(table.zeta[site][b] for site, b in plan.bits.items() if b is not None)


@pytest.mark.parametrize("target", [0.3, 0.25, 0.22, 0.2, *TARGETS, 0.09])
def test_the_search_for_beta_ends_where_that_on_the_full_table_does(target: float) -> None:
    table = table_of("bmshj2018-hyperprior")
    plan, meter = lazy_plan(table, target)
    full = make_plan(table, target)
    assert (plan.bits, plan.beta) == (full.bits, full.beta)
    limit = 6 if target > 0.25 else 4  # of 9 widths; at 9.6 bits noise decides
    assert meter.evaluations <= limit * len(table.sites)


@pytest.mark.parametrize(
    ("planner", "target"), [(planner, t) for planner in ("adaptive", "optimal") for t in TARGETS[::2]]
)
@pytest.mark.parametrize("name", TRAINED)
def test_plans_of_trained_models_cost_what_those_of_full_tables_do(
    name: str, planner: str, target: float
) -> None:
    table = table_of(name)
    plan, meter = lazy_plan(table, target, planner=planner)
    full = make_plan(table, target, planner=planner)
    # 0.2 % of the RD loss is less than what zeta of the mean-scale hyperprior is off by, to either side.
    assert zeta_of(table, plan) <= zeta_of(table, full) + 2e-3
    assert plan.cr <= target
    assert meter.evaluations <= (4 if planner == "adaptive" else 6.5) * len(table.sites)


@pytest.mark.parametrize("name", [*TRAINED, "mbt2018", "cheng2020-anchor"])
@pytest.mark.parametrize("planner", ["adaptive", "optimal"])
def test_a_plan_rests_on_measured_values(name: str, planner: str) -> None:
    table = table_of(name)
    fixed = {"g_a.0*": 5, "g_s.6*": 12, "h_a.2": None}
    plan, meter = lazy_plan(table, 0.2, planner=planner, fixed=fixed)
    assert not any(plan.interpolates(site) for site in plan.bits)
    assert meter.evaluations <= len(table.sites) * 9
    assert not plan.sensitivity.raw["h_a.2"]  # it stays float, and nothing asks what else it would cost


def test_a_uniform_plan_rests_on_nothing_and_says_nothing_of_zeta() -> None:
    table = table_of("bmshj2018-hyperprior")
    plan, meter = lazy_plan(table, 0.2, planner="uniform", fixed={"g_a.0*": 5})
    assert meter.evaluations == 0
    assert plan.bits == make_plan(table, 0.2, planner="uniform", fixed={"g_a.0*": 5}).bits
    assert math.isnan(plan.predicted)
    assert not any(plan.interpolates(site) for site in plan.bits)
    known, _ = lazy_plan(table, 0.2, planner="uniform", known=table)
    assert known.predicted == pytest.approx(zeta_of(table, known)), "what is known is said"


@pytest.mark.parametrize("planner", ["adaptive", "optimal"])
def test_a_full_table_is_not_measured_again_and_a_partial_one_is_completed(planner: str) -> None:
    table = table_of("bmshj2018-hyperprior")
    first, meter = lazy_plan(table, 0.1875, planner=planner)
    _, other = lazy_plan(table, 0.125, planner=planner)
    other_target, again = lazy_plan(table, 0.125, planner=planner, known=first.sensitivity)
    assert other_target.bits == make_plan(table, 0.125, planner=planner).bits
    assert again.evaluations < other.evaluations
    _, none = lazy_plan(table, 0.1875, planner=planner, known=first.sensitivity)
    assert none.evaluations == 0
    _, full = lazy_plan(table, 0.1875, planner=planner, known=table)
    assert full.evaluations == 0
    assert meter.evaluations > 0


def test_noise_makes_for_more_measurements() -> None:
    table = table_of("bmshj2018-hyperprior")
    shaken = {
        site: {b: value + (-1) ** b * 0.02 for b, value in values.items()}
        for site, values in table.rate.items()
    }
    _, quiet = lazy_plan(table, 0.15)
    _, noisy = lazy_plan(replace(table, rate=shaken), 0.15)
    assert noisy.evaluations > 1.5 * quiet.evaluations


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("off", [1.0, 1.4])
@pytest.mark.parametrize("name", TRAINED)
def test_a_sketch_saves_measurements_and_the_plan_costs_the_same(
    name: str, off: float, target: float
) -> None:
    """Zeta of the first images is 1.3 times that of all here, and besides ``off`` by turns up and down."""
    table = table_of(name)

    def sketched(part: Table) -> Table:
        return {s: {b: 1.3 * off ** (-1) ** b * z for b, z in values.items()} for s, values in part.items()}

    first = replace(table, rate=sketched(table.rate), distortion=sketched(table.distortion))
    plan, meter = lazy_plan(table, target, first=first)
    without, plain = lazy_plan(table, target)
    assert not any(plan.interpolates(site) for site in plan.bits)
    assert zeta_of(table, plan) <= zeta_of(table, without) * 1.02 + 2e-3
    assert meter.evaluations < 0.9 * plain.evaluations
    _, resumed = lazy_plan(table, target, known=plan.sensitivity, first=first)
    assert resumed.first is not None
    assert resumed.first.evaluations == 0, "what is known says more than a sketch"


@given(st.floats(1e-6, 10), st.floats(0.1, 3), st.sets(st.integers(2, 10), min_size=1))
def test_interpolation_on_a_line_is_exact_between_and_bounded_beyond(
    start: float, slope: float, measured: set[int]
) -> None:
    line = {b: start * math.exp(-slope * b) for b in range(2, 11)}
    known = {b: line[b] for b in measured}
    likely, low, high = (interpolated(known, line, bound=bound) for bound in (0, -1, 1))
    for b in line:
        if b in measured:
            assert likely[b] == low[b] == high[b] == line[b]
        elif min(measured) < b < max(measured):
            assert likely[b] == pytest.approx(line[b])
        if slope < 2 * math.log(4):  # a factor of 16 per bit, which the bounds allow for
            assert low[b] <= line[b] * (1 + 1e-9)
            assert high[b] >= line[b] * (1 - 1e-9)


def test_interpolation_by_hand() -> None:
    assert interpolated({4: 0.04}, (3, 4, 5)) == pytest.approx({3: 0.16, 4: 0.04, 5: 0.01})
    assert interpolated({3: 0.16, 5: 0.01}, (3, 4, 5))[4] == pytest.approx(0.04)
    assert interpolated({4: 0.04}, (5,), bound=-1)[5] == pytest.approx(0.0025)
    # Measured values 0.001 below zero: others may be as far off.
    assert interpolated({4: -0.001}, (5,), bound=1)[5] == pytest.approx(0.001 / 4 * 4 + 0.001)
    assert math.isnan(interpolated({}, (4,))[4])
    # The sketch is half as large where both are known, and off by a factor of 1.5 elsewhere.
    sketch = {3: 0.5, 4: 0.02, 6: 0.004, 7: -0.001}
    on = [interpolated({4: 0.04}, (3, 4, 6, 7), bound=bound, sketch=sketch) for bound in (0, -1, 1)]
    assert [values[3] for values in on] == pytest.approx([1.0, 1.0 / 1.5, 1.5])
    assert [values[6] for values in on] == pytest.approx([0.008, 0.008 / 1.5, 0.012])
    assert on[0][7] == pytest.approx(0.04 / 64), "noise says nothing"
    twice = interpolated({4: 0.04, 6: 0.08}, (3,), sketch=sketch)  # 2 and 20 times the sketch
    assert twice == interpolated({4: 0.04, 6: 0.08}, (3,)), "it was off, and is not believed"


def test_prepare_measures_a_part_and_makes_the_same_graph() -> None:
    model = fmpq_fx.samples.model()
    photos = fmpq_fx.images.crops.cut(fmpq_fx.samples.photos().values(), count=1, size=64)
    table = fmpq_fx.analyze(model, calibration=photos, lmbda=0.013)
    floats: Any = {"calibration": photos, "activation_bits": None}
    whole = fmpq_fx.plan_of(fmpq_fx.prepare(model, 0.15, sensitivity=table, **floats))
    lazy = fmpq_fx.plan_of(fmpq_fx.prepare(model, 0.15, lmbda=0.013, **floats))
    assert lazy.bits == whole.bits
    assert (lazy.beta, lazy.measured, lazy.clips) == (whole.beta, whole.measured, whole.clips)
    assert not lazy.sensitivity.complete
    assert len(lazy.sensitivity.missing) > len(table.sites) * 5
    assert table.complete
    for site, values in lazy.sensitivity.raw.items():
        assert values.items() <= table.raw[site].items()  # the same values, bit for bit


def test_a_partial_table_survives_json_and_says_what_it_is(tmp_path: Path) -> None:
    plan, _ = lazy_plan(table_of("mbt2018-mean"), 0.15)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json").sensitivity
    assert again == plan.sensitivity
    assert not again.complete
    assert again.zeta == plan.sensitivity.zeta
    measured = 20 * 9 - len(again.missing)
    assert again.extent == f"{measured} of 180 values measured"


def test_a_table_whose_values_are_no_candidates_is_refused() -> None:
    table = replace(table_of("mbt2018-mean"), candidates=(2, 3))
    with pytest.raises(FmpqError, match="different bit-widths"):
        Sensitivity.from_json(table.to_json())


def test_a_partial_table_of_other_images_or_weights_is_refused(x: Tensor) -> None:
    model, other = small_model("bmshj2018-hyperprior"), small_model("bmshj2018-hyperprior")
    other.get_parameter("g_s.6.bias").data += 1e-3
    uniform = fmpq_fx.prepare(
        model, 0.15, calibration=x, bits=(4, 5, 6), planner="uniform", activation_bits=None
    )
    table = fmpq_fx.plan_of(uniform).sensitivity
    assert not table.complete
    with pytest.raises(FmpqError, match=r"\b0 of 60 values measured.*other images"):
        fmpq_fx.prepare(model, 0.15, calibration=x.flip(-1), sensitivity=table)
    with pytest.raises(FmpqError, match="other weights"):
        fmpq_fx.prepare(other, 0.15, calibration=x, sensitivity=table)
    again = fmpq_fx.prepare(model, 0.15, calibration=x, sensitivity=table, activation_bits=None)
    completed = fmpq_fx.plan_of(again)
    assert len(completed.sensitivity.missing) < len(table.missing)
