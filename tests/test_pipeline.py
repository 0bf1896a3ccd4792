"""prepare() and rewrite() as a user calls them, on small models, and on the trained one."""

import copy
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, Plan
from fmpq_fx.images import crops
from fmpq_fx.passes.annotation import note_of
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.plan.task import make_plan
from fmpq_fx.passes.rewrite import activations_float
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import quantized_layers
from fmpq_fx.rd import rate_and_distortion
from support import REPOSITORY
from support.small_models import images, small_model

BITS = (2, 4, 6, 8)


@functools.cache
def prepared(name: str) -> fx.GraphModule:
    """Return a small model at 0.2, with mixed bits; not to be changed."""
    return fmpq_fx.prepare(small_model(name), 0.2, calibration=images(), bits=BITS)


@functools.cache
def table_of(name: str) -> fmpq_fx.Sensitivity:
    return fmpq_fx.analyze(small_model(name), calibration=images(), bits=BITS)


def test_the_size_is_what_was_asked_for(model_name: str) -> None:
    gm = prepared(model_name)
    plan = fmpq_fx.plan_of(gm)
    weights = {name: layer.float_weight().numel() for name, layer in quantized_layers(gm).items()}
    # Counted on the rewritten graph itself, not by the plan.
    quantized_bits = sum(n * quantized_layers(gm)[name].bits for name, n in weights.items())
    assert plan.cr == pytest.approx(quantized_bits / (32 * sum(weights.values())), rel=1e-12)
    assert 0.19 <= plan.cr <= 0.2
    assert set(weights) == {site.name for site in plan.sites}
    for name, layer in quantized_layers(gm).items():
        levels = layer.weight_quantizer.integers(layer.float_weight()).unique()
        assert len(levels) <= 2**layer.bits, name


def test_sites_and_float_remainder_are_the_whole_model(model_name: str, model: nn.Module) -> None:
    plan = fmpq_fx.plan_of(prepared(model_name))
    counted = sum(site.params for site in plan.sites) + sum(plan.float_remainder.values())
    assert counted == sum(p.numel() for p in model.parameters())


def loss(output: dict[str, Any], x: Tensor) -> float:
    """Return the RD loss with a lambda of 0.01."""
    return float(sum(rate_and_distortion(output, x, 0.01)))


def test_measured_losses_are_those_of_the_models(x: Tensor) -> None:
    model, x = small_model("mbt2018-mean").double(), x.double()  # so that no latent is close to a tie
    gm = fmpq_fx.prepare(model, 0.2, calibration=x, bits=BITS, lmbda=0.01)
    measured = fmpq_fx.plan_of(gm).measured
    assert measured is not None
    with torch.no_grad():
        assert measured.float_rd == pytest.approx(loss(model(x), x), rel=1e-9)
        assert measured.rd == pytest.approx(loss(gm(x), x), rel=1e-9)
        with activations_float(gm):
            assert measured.weights_rd == pytest.approx(loss(gm(x), x), rel=1e-9)
    assert measured.weights_rd != measured.rd


def test_a_table_serves_several_targets(x: Tensor) -> None:
    model, table = small_model("bmshj2018-hyperprior"), table_of("bmshj2018-hyperprior")
    for target in (0.1, 0.2):
        gm = fmpq_fx.prepare(model, target, calibration=x, sensitivity=table, activation_bits=None)
        plan = fmpq_fx.plan_of(gm)
        assert plan.sensitivity == table
        assert plan.bits == make_plan(table, target).bits


def test_rewrite_rebuilds_the_graph_from_a_saved_plan(
    model_name: str, model: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    gm = prepared(model_name)
    fmpq_fx.plan_of(gm).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == fmpq_fx.plan_of(gm)
    again = fmpq_fx.rewrite(model, plan)
    with torch.no_grad():
        for a, b in zip(_tensors(gm(x)), _tensors(again(x)), strict=True):
            assert torch.equal(a, b)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = fmpq_fx.plan_of(prepared("bmshj2018-hyperprior"))
    with pytest.raises(FmpqError, match="plan is of another model"):
        fmpq_fx.rewrite(small_model("mbt2018"), plan)


def test_a_plan_that_was_not_calibrated_is_refused() -> None:
    model = small_model("bmshj2018-hyperprior")
    plan = make_plan(table_of("bmshj2018-hyperprior"), 0.2)
    with pytest.raises(FmpqError, match="no activation ranges"):
        fmpq_fx.rewrite(model, plan)
    rewritten = fmpq_fx.rewrite(model, dataclasses.replace(plan, activation_bits=dict.fromkeys(plan.bits)))
    assert fmpq_fx.plan_of(rewritten).bits == plan.bits


def test_a_table_of_another_model_is_refused(x: Tensor) -> None:
    table = table_of("bmshj2018-hyperprior")
    with pytest.raises(FmpqError, match="sensitivity is of another model"):
        fmpq_fx.prepare(small_model("mbt2018-mean"), 0.2, calibration=x, sensitivity=table)
    with pytest.raises(ValueError, match="was measured with lmbda"):
        fmpq_fx.prepare(
            small_model("bmshj2018-hyperprior"), 0.2, calibration=x, sensitivity=table, lmbda=table.lmbda * 2
        )


def test_fixed_sites_get_their_bits_or_stay_float(x: Tensor) -> None:
    model = small_model("bmshj2018-hyperprior")
    fixed = {"g_s.6": 8, "h_s.*": 4, "g_a.0": None}
    gm = fmpq_fx.prepare(model, 0.2, calibration=x, bits=BITS, fixed=fixed, activation_bits=None)
    plan = fmpq_fx.plan_of(gm)
    assert plan.bits["g_s.6"] == 8
    assert all(bits == 4 for site, bits in plan.bits.items() if site.startswith("h_s"))
    assert plan.bits["g_a.0"] is None
    assert type(gm.get_submodule("g_a.0")) is nn.Conv2d
    assert torch.equal(gm.get_parameter("g_a.0.weight"), model.get_parameter("g_a.0.weight"))
    assert plan.cr <= 0.2


def test_mode_dtype_and_the_model_itself_stay_as_they_were(x: Tensor) -> None:
    model = small_model("mbt2018-mean").double().train()
    before = copy.deepcopy(model.state_dict())
    gm = fmpq_fx.prepare(model, 0.2, calibration=x, bits=BITS)
    assert gm.training
    assert all(module.training for module in gm.modules())
    assert {p.dtype for p in gm.parameters()} == {torch.float64}
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float_activations(x: Tensor) -> None:
    gm = fmpq_fx.prepare(small_model("mbt2018-mean"), 0.2, calibration=x, bits=BITS, activation_bits=None)
    measured = fmpq_fx.plan_of(gm).measured
    assert measured is not None
    assert measured.rd == measured.weights_rd
    assert all(layer.input_quantizer is None for layer in quantized_layers(gm).values())


def test_chosen_scales_lower_the_loss(x: Tensor) -> None:
    model = small_model("mbt2018")
    gm = fmpq_fx.prepare(
        model, 3 / 32, calibration=x, bits=[3], planner="uniform", lmbda=0.01, activation_bits=None
    )
    plan = fmpq_fx.plan_of(gm)
    assert plan.clips
    min_max = fmpq_fx.rewrite(model, dataclasses.replace(plan, clips={}))
    with torch.no_grad():
        assert loss(gm(x), x) < loss(min_max(x), x)


def test_notes_on_the_graph() -> None:
    gm = prepared("mbt2018")
    plan = fmpq_fx.plan_of(gm)
    noted = {}
    for node in gm.graph.nodes:
        note = note_of(node)
        for site in note.sites:
            assert note.zeta[site] == plan.sensitivity.zeta[site]
            noted[site] = note.bits[site]
    assert noted == plan.bits


@pytest.mark.parametrize(
    "mistake",
    [
        {"target_cr": 0.9},
        {"target_cr": 0.01},
        {"planner": "best"},
        {"fixed": {"g_x": 8}},
        {"activation_bits": 1},
    ],
)
def test_mistakes_are_told_before_the_long_measurement(x: Tensor, mistake: dict[str, Any]) -> None:
    model, runs = small_model("mbt2018"), []
    model.get_submodule("entropy_bottleneck").register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=r"reached|planner|g_x|activation_bits"):
        fmpq_fx.prepare(model, **{"target_cr": 0.2, "calibration": x, **mistake})
    assert 0 < len(runs) <= 20, "some runs make and check the graph; measuring takes hundreds"


def test_a_model_without_parameters() -> None:
    with pytest.raises(FmpqError, match="no parameters"):
        fmpq_fx.prepare(nn.ReLU(), 0.25)


def test_the_plan_as_json_is_plain() -> None:
    plan = fmpq_fx.plan_of(prepared("mbt2018"))
    fields = json.loads(plan.to_json())
    assert fields["format"] == "Plan"
    assert fields["bits"] == plan.bits
    assert all(len(step) == 2 for step in fields["history"])


def shared(*parts: str) -> Path:
    """Return a path among the development data, or skip the test where there is none."""
    folder = Path(os.environ.get("FMPQ_FX_SHARED", REPOSITORY.parent / "shared"))
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the development data, which is not part of the repository")
    return path


def test_fmpq_at_6_bits_costs_less_than_half_of_uniform_on_kodak() -> None:
    # Weights only, no fine-tuning, 4 crops of 128 x 128 that were not calibrated on. On all of Kodak, uniform widths
    # cost five times as much as the plan.
    kodak = crops.cut(shared("data", "kodak"), count=4, size=128)
    val = crops.cut(shared("data", "bsds500", "val"), count=2, size=128)
    model = fmpq_fx.samples.model()
    gm = trace(model)
    bench = make_bench(gm, kodak)
    float_rd = mean_rd(gm, bench, 0.013)
    above = {}
    for planner in ("adaptive", "uniform"):
        prepared = fmpq_fx.prepare(
            model,
            6 / 32,
            calibration=val,
            lmbda=0.013,
            planner=planner,
            bits=range(3, 10),
            activation_bits=None,
        )
        above[planner] = mean_rd(prepared, bench, 0.013) / float_rd - 1
    assert fmpq_fx.plan_of(prepared).average_bits == 6
    assert 0 < above["adaptive"] < above["uniform"] / 2


def _tensors(output: dict[str, Tensor | dict[str, Tensor]]) -> list[Tensor]:
    likelihoods = output["likelihoods"]
    assert isinstance(likelihoods, dict)
    x_hat = output["x_hat"]
    assert isinstance(x_hat, Tensor)
    return [x_hat, *likelihoods.values()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_and_zero_points_keep_their_precision_in_a_narrow_model(dtype: torch.dtype) -> None:
    gm = copy.deepcopy(prepared("mbt2018"))
    before = copy.deepcopy(gm.state_dict())
    gm.to(dtype)
    for name, value in gm.state_dict().items():
        quantizer = name.endswith(("log_scale", "log_spread", "zero_point"))
        assert (
            torch.equal(value, before[name])
            if quantizer
            else value.dtype == dtype or not value.is_floating_point()
        )
    layer = quantized_layers(gm)["g_a.2"]
    assert layer.weight.dtype == dtype
    assert layer.weight.isfinite().all()


class Cancelling(nn.Module):
    """Adds huge values to the image that cancel exactly, until two of three weights are rounded to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model("bmshj2018-hyperprior")
        self.cancel = nn.Conv2d(3, 3, 1, bias=False)
        weights = torch.tensor([2.0**100, -(2.0**99), -(2.0**99)])
        self.cancel.weight = nn.Parameter(weights.view(1, 3, 1, 1).repeat(3, 1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        out = self.inner(x)
        nothing = self.cancel(torch.cat([x[:, :1]] * 3, 1))
        return {"x_hat": out["x_hat"] + nothing, "likelihoods": out["likelihoods"]}


def test_a_quantized_model_that_is_not_finite_is_refused(x: Tensor) -> None:
    with pytest.raises(FmpqError, match="quantized model is not finite"):
        fmpq_fx.prepare(Cancelling(), 0.24, calibration=x, bits=BITS, fixed={"cancel": 2})
