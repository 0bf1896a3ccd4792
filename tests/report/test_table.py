"""The table of a plan, against numbers computed here from the model itself."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressai.latent_codecs import LatentCodec
from compressai.models import ScaleHyperprior
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.passes.measure.sensitivity import Measurement, measure_sensitivity
from fmpq_fx.passes.plan.tables import Measured, Plan, Table
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.trace import trace
from fmpq_fx.report.picture import plot_plan
from fmpq_fx.report.table import bit_table
from support import shown_plans
from support.shown_plans import WIDTHS, quantized

Show = Callable[..., str]


@pytest.fixture
def model() -> ScaleHyperprior:
    return shown_plans.model()


@pytest.fixture
def plan() -> Plan:
    return shown_plans.plan()


@pytest.fixture
def show(model: ScaleHyperprior, plan: Plan) -> Show:
    """Return the table of the plan with changes, some of which may be to its sensitivity."""

    def table(sensitivity: dict[str, Any] | None = None, **changes: Any) -> str:
        changed = replace(plan, sensitivity=replace(plan.sensitivity, **sensitivity or {}), **changes)
        return bit_table(quantized(model, changed))

    return table


def number(text: str) -> float:
    return float(text.replace(",", ""))


def rows_of(table: str) -> dict[str, list[str]]:
    """Return the cells of each row behind its name; the row of sums, which has no kind, is under "sum"."""
    lines = table.split("\n\n")[0].splitlines()
    assert re.sub(r" {2,}", "|", lines[0]) == "node|kind|parameters|bits|input|zeta %|bytes|share %"
    *sites, (_, *sums) = [re.split(r" {2,}", line.strip()) for line in lines[2:] if line[0] not in "-*"]
    return {**{name: cells for name, *cells in sites}, "sum": ["", *sums]}


def footer_of(table: str) -> dict[str, str]:
    """Return the text of each line below the table; continued lines are joined to it by single spaces."""
    found: dict[str, str] = {}
    for line in table.split("\n\n")[1].splitlines():
        name = line[:14].strip() or list(found)[-1]
        found[name] = " ".join([found.get(name, ""), *line[14:].split()]).strip()
    return found


def test_a_row_has_the_bytes_and_share_of_the_weights(model: ScaleHyperprior, show: Show) -> None:
    rows = rows_of(show())
    sums = rows.pop("sum")
    # In the order of the data flow, not of the alphabet or of the state_dict.
    transforms = {"g_a": range(7), "h_a": (0, 2, 4), "h_s": (0, 2, 4), "g_s": range(7)}
    assert list(rows) == [f"{transform}.{i}" for transform, places in transforms.items() for i in places]

    bits = {name: WIDTHS[i % 3] for i, name in enumerate(rows)}
    layers = {name: model.get_submodule(name) for name in rows}
    numel = {name: (m.gamma if hasattr(m, "gamma") else m.weight).numel() for name, m in layers.items()}
    total = sum(numel[name] * bits[name] / 8 for name in rows)
    for name, (kind, *cells, _, size, share) in rows.items():
        assert (kind, *cells) == (type(layers[name]).__name__, f"{numel[name]:,}", str(bits[name]), "8")
        assert number(size) == pytest.approx(numel[name] * bits[name] / 8, abs=0.51)
        assert number(share) == pytest.approx(100 * numel[name] * bits[name] / 8 / total, abs=0.051)
    assert sum(number(cells[-1]) for cells in rows.values()) == pytest.approx(100, abs=0.05 * len(rows))
    params, average = sum(numel.values()), f"{total * 8 / sum(numel.values()):.1f}"
    assert (*sums[1:4], *sums[5:]) == (f"{params:,}", average, "8.0", f"{total:,.0f}", "100.0")


def test_sizes_and_search_below_the_table(plan: Plan, show: Show) -> None:
    footer = footer_of(show())
    full = 4 * sum(site.params for site in plan.sites)
    size = sum(site.params * WIDTHS[i % 3] / 8 for i, site in enumerate(plan.sites))
    assert footer["average bits"] == f"W{32 * size / full:.1f}A8"
    assert footer["size"] == f"{size / 1e3:.1f} kB instead of {full / 1e3:.1f} kB (float32)"
    assert footer["CR"] == f"{size / full:.4f} ({full / size:.1f}x smaller), target 0.1875 (5.3x smaller)"
    assert footer["planner"] == "adaptive, beta 0.0123 (zeta < 1.23 %), 3 search steps"
    assert float(footer["lambda"]) == pytest.approx(plan.lmbda, rel=1e-3)
    assert (footer["images"], footer.get("remarks")) == ("1 crop of 64 x 64", None)


def test_a_parameter_is_in_a_row_or_stays_float(model: ScaleHyperprior, show: Show) -> None:
    rows, text = rows_of(show()), footer_of(show())["stays float"]
    rest = sum(p.numel() for p in model.parameters()) - int(number(rows["sum"][1]))
    bottleneck = sum(p.numel() for p in model.entropy_bottleneck.parameters())
    beta = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".beta"))
    parts = f"EntropyBottleneck {bottleneck:,}, bias {rest - bottleneck - beta:,}, beta {beta:,}"
    assert text == f"{rest:,} more parameters, {4 * rest / 1e3:.2f} kB: {parts}"


def test_only_the_largest_kinds_of_float_parameters_are_named(show: Show) -> None:
    names = {"g_a.0.bias": 1_000_000, "a": 50, "b": 40, "c": 30, "d": 2, "e": 1}
    text = footer_of(show({"float_remainder": names}))["stays float"]
    assert text == "1,000,123 more parameters, 4.00 MB: bias 1,000,000, a 50, b 40, c 30, others 3"
    assert footer_of(show({"float_remainder": {}}))["stays float"] == "nothing else"


def test_the_loss_is_shown_in_steps_beside_its_prediction(plan: Plan, show: Show) -> None:
    made_up = {s.name: {2: 0.03, 5: 0.02, 8: 0.01} for s in plan.sites}
    table = show({"rate": made_up, "distortion": made_up})
    # Of 20 sites 7, 7 and 6 have 2, 5 and 8 bits; rate and distortion each contribute 0.41.
    assert rows_of(table)["sum"][4] == "82.000"
    base, words = plan.sensitivity.float_rd, footer_of(table)["RD loss"]
    weights = f"weights quantized {1.05 * base:.4f} +5.00 % (sum of zeta: +82.00 %)"
    assert words == f"float {base:.4f} {weights} activations too {1.1 * base:.4f} +10.00 %"
    weights_only = footer_of(show(activation_bits=dict.fromkeys(plan.bits)))
    assert weights_only["average bits"].endswith("A32")
    assert "activations" not in weights_only["RD loss"]


def test_zeta_is_the_one_that_planners_saw(plan: Plan, show: Show) -> None:
    """From 5 to 8 bits, what was measured rises from 0.1 to 0.3 %: both become the mean. Zero has no sign."""
    distortion = {site.name: {2: 0.02, 5: 0.001, 8: 0.003} for site in plan.sites}
    distortion |= {"g_a.3": dict.fromkeys(WIDTHS, -1e-9), "g_a.6": {2: 1e6, 5: 0.0, 8: 0.0}}
    rate = {site.name: dict.fromkeys(WIDTHS, 0.0) for site in plan.sites}
    rows = rows_of(show({"rate": rate, "distortion": distortion}))
    assert [rows[f"g_a.{i}"][4] for i in (0, 1, 2, 3, 6)] == ["2.000", "0.200", "0.200", "0.000", "1e+08"]


def test_a_float_site_and_one_of_unmeasured_width(plan: Plan, show: Show) -> None:
    table = show(bits={**plan.bits, "g_a.0": None, "g_s.6": 12})
    rows = rows_of(table)
    assert rows["g_a.0"][1:6] == ["600", "float", "float", "0.000", "2,400"]
    assert rows["g_s.6"][1:6] == ["600", "12", "8", "-", "900"]
    assert "nan" not in table
    assert "1 site unknown)" in footer_of(table)["RD loss"]


def test_operations_are_those_of_the_widths(plan: Plan, show: Show) -> None:
    names = [site.name for site in plan.sites]
    macs = {name: 1.0 + i for i, name in enumerate(names)}
    bits = dict.fromkeys(names, 8) | {names[0]: 9, names[1]: None}
    inputs = dict.fromkeys(names, 8) | {names[0]: 16, names[2]: 12, names[3]: None}
    footer = footer_of(show(bits=bits, activation_bits=inputs, macs=macs))
    # Site 0 takes 4 products, site 2 takes 2, sites 1 and 3 are float: 4 * 1 + 2 * 3 + (5 + ... + 20), of 2 + 3 + 200.
    assert (
        footer["operations"]
        == "210 products of 8-bit integers per pixel, 2 % more than with inputs of 8 bits"
    )
    average = (16 * 1 + 32 * 2 + 12 * 3 + 32 * 4 + 8 * 200) / 210
    assert footer["average bits"].endswith(f"A{average:.1f}")
    same = footer_of(show(macs=macs, bits=dict.fromkeys(names, 8)))
    assert same["operations"] == "210 products of 8-bit integers per pixel"


def test_what_was_not_measured_or_is_not_known_is_said(plan: Plan, show: Show) -> None:
    same, remark = dict.fromkeys(plan.bits, 8), "A remark. " * 20
    unknown: dict[str, Any] = {"measured": None, "beta": None, "history": (), "bits": same}
    table = show({"images": ""}, planner="uniform", remarks=remark, **unknown)
    footer = footer_of(table)
    assert footer["RD loss"].startswith("not measured (sum of zeta: ")
    assert (footer["planner"], footer["average bits"], footer["images"]) == (
        "uniform",
        "W8A8",
        "not recorded",
    )
    assert footer["remarks"] == remark.strip()
    assert max(map(len, table.splitlines())) <= 96
    words = footer_of(show(measured=Measured(1.0, 1.1, 1.2)))["images"]
    seen = f"{plan.sensitivity.float_rd:.4f}"
    assert words == f"1 crop of 64 x 64 for zeta (float RD loss {seen}); others for the RD loss above"


def test_a_plan_that_rests_on_no_zeta_says_so(plan: Plan, show: Show) -> None:
    nothing: Table = {site: {} for site in plan.bits}
    table = show({"rate": nothing, "distortion": nothing, "candidates": plan.sensitivity.bits})
    assert all(row[4] == "-" for row in rows_of(table).values())
    assert "zeta was not measured" in footer_of(table)["RD loss"]
    assert "nan" not in table


class Codec(LatentCodec):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Conv2d(4, 4, 1)

    def forward(self, y: Tensor) -> dict[str, Any]:
        return {"y_hat": self.h(y), "likelihoods": {"y": y.sigmoid()}}


class WithCodec(nn.Sequential):
    def forward(self, x: Tensor) -> dict[str, Any]:
        coded = self[1](self[0](x))
        return {"x_hat": self[2](coded["y_hat"]), "likelihoods": coded["likelihoods"]}


def test_sites_inside_an_opaque_module_are_marked(plan: Plan) -> None:
    gm = trace(WithCodec(nn.Conv2d(3, 4, 1), Codec(), nn.Conv2d(4, 3, 1)))
    table = measure_sensitivity(gm, make_bench(gm, [torch.rand(1, 3, 8, 8)]), Measurement(bits=(4,)))
    bits: dict[str, int | None] = dict.fromkeys(table.zeta, 4)
    own = replace(plan, sites=table.sites, bits=bits, activation_bits=bits, sensitivity=table)
    text = bit_table(quantize(gm, own))
    assert list(rows_of(text)) == ["0", "1.h *", "2", "sum"]
    assert "\n* inside a module that is one node of the graph: 1 (1 site)\n" in text


def test_without_a_plan_there_is_nothing_to_show() -> None:
    for show in (bit_table, lambda gm: plot_plan(gm, "plan.png")):
        with pytest.raises(FmpqError, match="carries no plan"):
            show(fx.symbolic_trace(nn.Identity()))
