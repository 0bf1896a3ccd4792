"""Tracing: the graph computes what the model computes, bit for bit, and the model is left as it was."""

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compressai.models as zoo
import pytest
import torch
import torch.nn.functional as F
from compressai.layers import GDN
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.checkpoint import checkpoint

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import graph_note, note_of
from fmpq_fx.passes.check_trace import check_trace
from fmpq_fx.passes.sites import find_sites, float_remainder
from fmpq_fx.passes.trace import trace
from support.traced_models import (
    PLAIN,
    Branch,
    Codec,
    Make,
    assert_same,
    each_codec,
    each_model,
    lively,
    outputs,
    photos,
)


@functools.cache
def traced(make: Make) -> fx.GraphModule:
    """Return the graph of a lively model, to be copied before it is changed."""
    return trace(lively(make))


@each_model
def test_the_graph_computes_what_the_model_computes(make: Make) -> None:
    model, x = lively(make), photos()
    expected = outputs(model, x)
    assert not torch.equal(*expected["x_hat"]), "the latents carry nothing, so equality would show nothing"
    gm = traced(make)
    assert_same(outputs(gm, x), expected)
    check_trace(model, gm, x)


@pytest.mark.filterwarnings("error")
@each_model
def test_tracing_leaves_the_model_as_it_was_and_warns_of_nothing(make: Make) -> None:
    model = lively(make).train()
    model.get_submodule("g_s").eval()  # frozen, as in partial fine-tuning
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    inplace = {name: getattr(m, "inplace", None) for name, m in model.named_modules()}
    gm = trace(model)
    check_trace(model, gm, photos(1))
    find_sites(gm)
    assert [m.training for m in model.modules()] == modes
    assert inplace == {name: getattr(m, "inplace", None) for name, m in model.named_modules()}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    ours = {t.untyped_storage().data_ptr() for t in gm.state_dict().values() if t.numel()}
    assert not ours & {t.untyped_storage().data_ptr() for t in after.values() if t.numel()}, "shared storage"


@each_model
def test_every_parameter_is_counted_once(make: Make) -> None:
    model, gm = lively(make), copy.deepcopy(traced(make))
    sites = find_sites(gm)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, GDN)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    assert {s.name for s in sites} == layers.keys()
    for site in sites:
        layer = layers[site.name]
        assert site.params == (layer.gamma if isinstance(layer, GDN) else layer.weight).numel()
        assert site.kind == type(layer).__name__
    quantized = sum(site.params for site in sites)
    left = sum(float_remainder(gm, sites).values())
    assert quantized + left == sum(p.numel() for p in model.parameters())


@each_model
def test_training_adds_the_very_noise_that_the_model_adds(make: Make) -> None:
    """Tracing in evaluation mode would leave rounding in an autoregressive model's graph, and no gradient."""
    model, x, gm = lively(make), photos(1), copy.deepcopy(traced(make))
    torch.manual_seed(2)
    expected = outputs(model.train(), x)
    torch.manual_seed(2)
    assert_same(outputs(gm.train(), x), expected)


@each_codec
def test_sites_inside_an_opaque_codec_belong_to_its_node(make: Make) -> None:
    gm = copy.deepcopy(traced(make))
    inside = {site.name: site for site in find_sites(gm) if site.name.startswith("latent_codec.")}
    (node,) = [n for n in gm.graph.nodes if n.target == "latent_codec"]
    assert "latent_codec.hyper.h_a.0" in inside
    assert any(site.kind == "CheckerboardMaskedConv2d" for site in inside.values())
    assert {site.node for site in inside.values()} == {node.name}
    assert note_of(node).sites == tuple(inside)


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(x.numpy())


def test_the_innermost_module_and_the_users_line_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    model = Codec()
    model.conv = nn.Sequential(nn.Conv2d(3, 3, 1), ThroughNumpy())  # type: ignore[assignment]
    with pytest.raises(FmpqError) as caught:
        trace(model, photos())
    assert "module 'conv.1' (ThroughNumpy) takes values out of torch, into NumPy" in str(caught.value)
    assert re.search(r"test_trace\.py:\d+: return x \* torch\.from_numpy\(x\.numpy\(\)\)", str(caught.value))
    assert "LatentCodec" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_decision_on_values_is_kept_and_checked(capfd: pytest.CaptureFixture[str]) -> None:
    model = Codec()
    model.conv = nn.Sequential(nn.Conv2d(3, 3, 1), Branch())  # type: ignore[assignment]
    dark, bright = -10 * torch.ones(1, 3, 64, 64), 10 * torch.ones(1, 3, 64, 64)
    seen = [outputs(model.eval(), x)["x_hat"] for x in (dark, bright)]
    gm = trace(model, dark)
    assert torch.equal(outputs(gm, dark)["x_hat"], seen[0])
    with pytest.raises(FmpqError, match=r"traced_models\.py:\d+: return x if x\.mean\(\) > 0 else -x"):
        outputs(gm, bright)
    assert capfd.readouterr().err == ""


def test_a_layer_that_runs_twice_is_one_site_with_two_nodes() -> None:
    gm = trace(Codec(lambda m, x: m.conv(m.conv(x))))
    assert [(site.name, site.node) for site in find_sites(gm)] == [("conv", "conv"), ("last", "last")]
    noted = [n.target for n in gm.graph.nodes if note_of(n).sites == ("conv",)]
    assert noted == ["conv", "conv"]


def test_a_functional_convolution_stays_float_and_is_counted_so() -> None:
    model = Codec(lambda m, x: F.conv2d(x, m.conv.weight, padding=1) + m.shift).eval()
    gm = trace(model)
    check_trace(model, gm, photos())
    sites = find_sites(gm)
    assert [site.name for site in sites] == ["last"]
    left = float_remainder(gm, sites)
    assert (left["conv.weight"], left["shift"], left["last.bias"]) == (81, 1, 3)
    assert "last.weight" not in left


def test_a_model_without_layers_has_no_sites() -> None:
    model = Codec(lambda m, x: x + m.shift)
    model.last = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(FmpqError, match="nothing to quantize"):
        find_sites(trace(model))


def test_a_diverged_model_is_told_so() -> None:
    model = Codec().eval()
    nn.init.constant_(model.last.weight, float("nan"))
    gm = trace(model)
    check_trace(model, gm, photos())  # no complaint of the trace, which is right
    with pytest.raises(FmpqError, match=r"9 of 9 values of last\.weight are NaN"):
        find_sites(gm)


@pytest.mark.parametrize(
    ("given", "what"), [(nn.Identity, "the class Identity"), ("model.pth", "a str"), ({}, "a dict")]
)
def test_what_is_no_model_is_named(given: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"the model is {what}; pass a torch.nn.Module"):
        trace(given, torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "torch.compile"])
def test_what_wraps_a_model_is_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = lively(PLAIN["scale hyperprior"])
    gm = trace(wrap(model), photos())
    assert type(graph_note(gm).model) is zoo.ScaleHyperprior
    check_trace(wrap(model), gm, photos())


def test_compiled_parts_are_those_that_were_compiled() -> None:
    model: Any = lively(PLAIN["scale hyperprior"])
    model.g_a = torch.compile(model.g_a)
    gm = trace(model, photos())
    assert isinstance(graph_note(gm).model.get_submodule("g_a.0"), nn.Conv2d)
    assert isinstance(model.g_a, torch._dynamo.OptimizedModule)
    check_trace(model, gm, photos())


def without_bookkeeping(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.conv(x)
        y.mul_(2)
        y[:, 0] = 1
    return y.clone()  # type: ignore[no-any-return]


PLAINLY: dict[str, Callable[[Any, Any], Any]] = {
    "a checkpoint": lambda m, x: checkpoint(m.conv, x, use_reentrant=True),
    "inference mode": without_bookkeeping,
    "torch.ops": lambda m, x: torch.ops.aten.relu(m.conv(x)),
    "an item": lambda m, x: m.conv(x) * (int(x[:, :, 0, 0].sum().item()) % 3 + 1),
    "a list": lambda m, x: m.conv(x) * sum(x[0, 0, 0, :3].tolist()),
    "rows one by one": lambda m, x: (
        torch.stack([m.conv(row[None])[0] for row in x.repeat(2, 1, 1, 1)[:1]]) + 0 * x
    ),
}


@pytest.mark.parametrize("analysis", PLAINLY.values(), ids=PLAINLY)
def test_what_python_and_torch_do_beside_functions_is_recorded(
    analysis: Callable[[Any, Any], Any], tmp_path: Path
) -> None:
    model = Codec(analysis).eval()
    gm = trace(model, photos(1))
    check_trace(model, gm, photos())
    del graph_note(gm).model.analysis  # which pickle refuses
    torch.save(gm, tmp_path / "gm.pt")
    assert_same(
        outputs(torch.load(tmp_path / "gm.pt", weights_only=False), photos()), outputs(model, photos())
    )


def test_a_scripted_model_is_refused_with_what_to_do() -> None:
    model = Codec()
    model.last = torch.jit.trace(model.last, photos())
    with pytest.raises(FmpqError, match=r"'last' is scripted.*pass the nn\.Module that it was made from"):
        trace(model)


def test_a_model_that_wants_more_than_images_is_refused_with_what_to_do() -> None:
    class Video(Codec):
        def forward(self, x: Tensor, before: Tensor, scale: float = 1.0) -> dict[str, Any]:  # type: ignore[override]
            return super().forward(x - before)

    with pytest.raises(FmpqError, match=r"wants 'before' besides images.*wrap the model"):
        trace(Video())


NORMS: dict[str, tuple[Any, Callable[[nn.Module], Any]]] = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, lambda m: remove_parametrizations(m, "weight")),
    "spectral_norm": (
        nn.utils.parametrizations.spectral_norm,
        lambda m: remove_parametrizations(m, "weight"),
    ),
    "weight_norm of hooks": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm of hooks": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("norm", "remove"), NORMS.values(), ids=NORMS)
def test_a_weight_that_is_computed_from_others_is_refused_with_the_remedy(
    norm: Callable[[nn.Module], Any], remove: Callable[[nn.Module], Any]
) -> None:
    model = Codec().eval()
    norm(model.last)
    with pytest.raises(FmpqError, match=r"weight of 'last' is computed from other parameters.*remove_"):
        trace(model)
    remove(model.last)
    assert [site.name for site in find_sites(trace(model))] == ["conv", "last"]


def test_two_layers_with_one_weight_are_refused() -> None:
    model = zoo.ScaleHyperprior(8, 12).eval()
    model.h_a[4].weight = model.h_a[2].weight
    with pytest.raises(FmpqError, match=r"'h_a\.2' and 'h_a\.4' share one weight tensor"):
        find_sites(trace(model))
