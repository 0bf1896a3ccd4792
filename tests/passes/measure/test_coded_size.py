"""Planning in the bytes that the model file takes, and the report that says where those are."""

from pathlib import Path

import pytest
from torch import Tensor

import fmpq_fx
from fmpq_fx import FmpqError, Plan
from fmpq_fx.passes.measure.coded_sizes import measure_coded_sizes
from fmpq_fx.passes.plan.planners import PLANNERS
from fmpq_fx.passes.plan.tables import Table
from fmpq_fx.passes.plan.task import make_plan
from fmpq_fx.passes.trace import trace
from support.sensitivities import PARAMS, sensitivity
from support.small_models import small_model

# Every width of every site takes three quarters of its nominal bytes and some more.
CODED: Table = {site: {b: 0.75 * count * b / 8 + 40 for b in range(2, 11)} for site, count in PARAMS.items()}
FLOAT = 4 * sum(PARAMS.values())


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("target", [0.2, 0.15, 0.1])
def test_the_coded_bytes_are_within_the_target(planner: str, target: float) -> None:
    plan = make_plan(sensitivity(), target, planner=planner, coded=CODED)
    coded = sum(CODED[site][bits] for site, bits in plan.bits.items() if bits is not None)
    assert plan.cr == pytest.approx(coded / FLOAT, rel=1e-12)
    assert plan.cr <= target
    assert plan.nominal_bytes / FLOAT > target  # which nominal planning would not have allowed
    assert plan.average_bits == pytest.approx(
        sum(PARAMS[site] * bits for site, bits in plan.bits.items() if bits) / sum(PARAMS.values())
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_a_site_that_stays_float_takes_its_float_bytes() -> None:
    plan = make_plan(sensitivity(), 0.2, planner="optimal", coded=CODED, fixed={"g_s.6": None})
    site = next(site for site in plan.sites if site.name == "g_s.6")
    assert plan.bytes_of(site) == 4 * site.params


def test_an_unreachable_coded_target_names_what_is_reachable() -> None:
    low = sum(values[2] for values in CODED.values()) / FLOAT
    with pytest.raises(ValueError, match=r"CR is in \[0\.0") as caught:
        make_plan(sensitivity(), 0.9 * low, coded=CODED)
    assert f"{low:.3f}"[:5] in str(caught.value)


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
def test_the_planned_size_is_that_of_the_file(name: str, x: Tensor, tmp_path: Path) -> None:
    gm = fmpq_fx.prepare(
        small_model(name),
        0.2,
        calibration=x,
        size="coded",
        bits=range(2, 9),
        activation_bits=None,
        fixed={"g_a.1": 12, "g_s.1": None},
    )
    plan = fmpq_fx.plan_of(gm)
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    report = fmpq_fx.file_report(tmp_path / "model.fmpq")
    sizes = {site.site: site.coded + site.side for site in report.sites}
    planned = {site.name: plan.bytes_of(site) for site in plan.sites if plan.bits[site.name] is not None}
    assert sizes == planned
    assert sum(report.parts.values()) == report.size == (tmp_path / "model.fmpq").stat().st_size
    assert plan.clips == {}  # a clipped range has finer steps, which take more bytes
    assert "coded bytes" in fmpq_fx.bit_table(gm)
    assert "g_s.1" not in sizes
    for site in report.sites:
        assert site.bits == plan.bits[site.site]
        assert site.site in str(report)


def test_fixed_sites_are_coded_at_their_width_alone() -> None:
    gm = trace(small_model("bmshj2018-hyperprior"))
    table = measure_coded_sizes(gm, (2, 4), {"g_a.0": 7, "g_a.2": None})
    assert set(table["g_a.0"]) == {7}
    assert table["g_a.2"] == {}
    assert set(table["h_a.0"]) == {2, 4}
    assert table["h_a.0"][2] < table["h_a.0"][4]


def test_an_unknown_size_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match="size is 'real'; pass one of 'nominal', 'coded'"):
        fmpq_fx.prepare(small_model("mbt2018-mean"), 0.2, calibration=x, size="real")


def test_a_report_needs_a_model_file(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(FmpqError, match=r"photo.png is damaged, or no model file"):
        fmpq_fx.file_report(tmp_path / "photo.png")
