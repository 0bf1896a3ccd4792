"""Rewriting: quantized layers take their places, the plan stays with the graph, and all can be trained."""

import copy
import functools
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import compressai.models as zoo
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.optimizers import net_aux_optimizer
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_sites, plan_of
from fmpq_fx.passes.clip.ranges import calibrate
from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import ActivationFakeQuant, quantize_layer, quantized_layers
from support.coded_models import quantized
from support.rewritten import notes, outputs, plan_for, same
from support.small_models import images, small_model


@functools.cache
def rewritten_once(name: str) -> fx.GraphModule:
    float_gm = trace(small_model(name))
    rewritten = quantize(float_gm, plan_for(float_gm, 8, g_a__0=None))
    calibrate(rewritten, make_bench(rewritten, [images()]))
    return rewritten


@pytest.fixture
def gm(model_name: str) -> fx.GraphModule:
    """Each small model quantized to mixed bits with 8-bit activations, calibrated, g_a.0 left float."""
    return copy.deepcopy(rewritten_once(model_name))


def test_the_rewrite_is_the_model_with_each_layer_replaced_by_hand(model: nn.Module, x: Tensor) -> None:
    gm = trace(model)
    plan = plan_for(gm)
    rewritten = quantize(gm, plan)
    rewritten.graph.lint()
    by_hand = copy.deepcopy(model)
    for name, bits in plan.bits.items():
        assert bits is not None
        parent, _, leaf = name.rpartition(".")
        setattr(by_hand.get_submodule(parent), leaf, quantize_layer(by_hand.get_submodule(name), bits))
    assert same(outputs(rewritten, x), outputs(by_hand, x))
    assert not same(outputs(rewritten, x), outputs(model, x)), "nothing was quantized"
    assert {name: layer.bits for name, layer in quantized_layers(rewritten).items()} == plan.bits
    assert plan_of(rewritten) is plan


def test_a_site_without_bits_stays_the_very_float_layer(model: nn.Module, x: Tensor) -> None:
    gm = trace(model)
    kept, state = gm.get_submodule("g_s.2"), dict(gm.get_submodule("g_s.2").named_parameters())
    rewritten = quantize(gm, plan_for(gm, 8, g_s__2=None))
    assert rewritten.get_submodule("g_s.2") is kept
    assert all(p is state[name] for name, p in kept.named_parameters())
    assert "g_s.2" not in quantized_layers(rewritten)
    gm = trace(model)
    assert same(outputs(quantize(gm, plan_for(gm, **dict.fromkeys(_names(gm)))), x), outputs(model, x))


def _names(gm: fx.GraphModule) -> list[str]:
    return [site.name.replace(".", "__") for site in find_sites(gm)]


def test_bits_are_on_the_nodes_and_in_the_printed_code(
    gm: fx.GraphModule, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(gm)
    for target, note in notes(gm):
        assert note.bits == {target: plan.bits[target]}
    assert len(notes(gm)) == len(plan.sites)
    gm.print_readable()
    printed = capsys.readouterr().out
    assert printed.count("'bits': ") == len(plan.sites)
    assert f"'bits': {plan.bits['g_s.0']}}}" in printed


def test_a_deep_copy_is_alike_and_shares_nothing(gm: fx.GraphModule, x: Tensor) -> None:
    twin = copy.deepcopy(gm)
    assert plan_of(twin) == plan_of(gm)
    assert notes(twin) == notes(gm)
    before = outputs(gm, x)
    assert same(outputs(twin, x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert same(outputs(gm, x), before)


def test_the_notes_of_a_deep_copy_are_its_own(gm: fx.GraphModule) -> None:
    before = copy.deepcopy(notes(gm))
    annotate_sites(copy.deepcopy(gm), bits=dict.fromkeys(plan_of(gm).bits, 99))
    assert notes(gm) == before


def test_a_trained_state_loads_into_a_fresh_rewrite(gm: fx.GraphModule, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.mul_(1.01)
    fresh = quantize(trace(model), plan_of(gm))
    assert not same(outputs(fresh, x), outputs(gm, x))
    fresh.load_state_dict(gm.state_dict())
    assert same(outputs(fresh, x), outputs(gm, x))


@pytest.mark.parametrize("training", [True, False])
def test_saving_keeps_outputs_plan_and_notes(
    gm: fx.GraphModule, x: Tensor, tmp_path: Path, training: bool
) -> None:
    torch.save(gm.train(training), tmp_path / "gm.pt")
    loaded = torch.load(tmp_path / "gm.pt", weights_only=False)
    assert [m.training for m in loaded.modules()] == [training] * len(list(gm.modules()))
    assert same(outputs(loaded.eval(), x), outputs(gm.eval(), x))
    assert plan_of(loaded) == plan_of(gm)
    assert notes(loaded) == notes(gm)


def test_bits_are_printed_after_loading_too(
    gm: fx.GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(gm, tmp_path / "gm.pt")
    torch.load(tmp_path / "gm.pt", weights_only=False).print_readable()
    assert "'bits': " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Was not able to save the following children modules")
def test_to_folder_writes_code_that_computes_the_same(
    gm: fx.GraphModule, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm.to_folder(tmp_path / "written_model", "Written")
    monkeypatch.syspath_prepend(tmp_path)
    written = importlib.import_module("written_model").Written()
    for name in ("written_model", "written_model.module"):
        del sys.modules[name]
    assert same(outputs(written.eval(), x), outputs(gm, x))


def test_float64_and_modes_reach_all_parts(gm: fx.GraphModule, x: Tensor) -> None:
    gm.train()
    assert all(module.training for module in gm.modules())
    gm.eval()
    assert not any(module.training for module in gm.modules())
    before = outputs(gm, x)[0]
    after = outputs(gm.to(torch.float64), x.double())[0]
    assert after.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in gm.parameters())
    assert (after - before).abs().mean() < 0.1 * before.std(), "only roundings that lie on an edge may differ"


def narrow(quantizer: nn.Module, args: tuple[Tensor]) -> None:
    """Give a quantizer too narrow a range for its input: clipped values are what moves a zero point."""
    assert isinstance(quantizer, ActivationFakeQuant)
    high = args[0].abs().max().item() / 2
    quantizer.freeze(-high, high, False)


def test_a_training_step_reaches_every_parameter(model: nn.Module, x: Tensor) -> None:
    gm = trace(model)
    gm = quantize(gm, plan_for(gm, 6))
    for layer in quantized_layers(gm).values():
        assert layer.input_quantizer is not None
        layer.input_quantizer.register_forward_pre_hook(narrow)
    output = gm.train()(x)
    rate = sum(-torch.log2(p).sum() for p in output["likelihoods"].values())
    (rate / x.numel() + 100 * (output["x_hat"] - x).square().mean()).backward()
    trained = {n: p for n, p in gm.named_parameters() if not n.endswith(".quantiles")}  # by an auxiliary loss
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    kinds = [sum(name.endswith(kind) for name in trained) for kind in ("log_scale", "zero_point")]
    assert kinds == [2 * len(plan_of(gm).sites), len(plan_of(gm).sites)]


def test_a_training_loop_of_compressai_takes_a_graph_for_a_model() -> None:
    gm = copy.deepcopy(quantized("scale hyperprior"))
    # It reads whole numbers, so that its step is not trained.
    assert "g_s.0.input_quantizer.log_scale" in gm.state_dict().keys() - dict(gm.named_parameters()).keys()
    rates = {"net": {"type": "Adam", "lr": 1e-4}, "aux": {"type": "Adam", "lr": 1e-3}}
    optimizers = net_aux_optimizer(gm, rates)
    trained = [p for optimizer in optimizers.values() for p in optimizer.param_groups[0]["params"]]
    assert {id(p) for p in trained} == {id(p) for p in gm.parameters()}
    loss = gm.aux_loss()
    assert loss.item() == sum(m.loss() for m in gm.modules() if isinstance(m, EntropyBottleneck)).item()
    loss.backward()
    assert gm.get_parameter("entropy_bottleneck.quantiles").grad is not None
    for call in (gm.update, gm.compress, gm.decompress):
        with pytest.raises(FmpqError, match=r"convert\(gm\)"):
            call()


def test_the_plan_of_another_model_is_refused(model: nn.Module) -> None:
    other = trace(zoo.ScaleHyperprior(4, 6))
    with pytest.raises(FmpqError, match=r"of another model.*'.*'.*prepare"):
        quantize(trace(model), plan_for(other))
    gm = trace(model)
    plan = plan_for(gm)
    with pytest.raises(FmpqError, match=r"1 sites, the first of them 'g_a\.0' \(model: Site.*no such site"):
        quantize(gm, replace(plan, sites=plan.sites[1:]))
    assert not quantized_layers(gm), "refused too late"


def test_a_quantized_model_is_not_quantized_again(gm: fx.GraphModule, x: Tensor) -> None:
    with pytest.raises(FmpqError, match="quantized already"):
        trace(gm)
    before = notes(gm)
    with pytest.raises(FmpqError, match="quantized already"):
        quantize(gm, plan_of(gm))
    assert notes(gm) == before


def test_a_graph_without_a_plan_is_told_so(model: nn.Module) -> None:
    for module in (trace(model), model):
        with pytest.raises(FmpqError, match="carries no plan"):
            plan_of(module)
