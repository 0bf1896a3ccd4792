"""Tracing: the graph computes what the model computes, bit for bit, and the model is left as it was."""

import copy
import re
from collections.abc import Callable
from typing import Any

import compressai.models as zoo
import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN
from compressai.models import vbr
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.functionalize import functionalize
from fmpq_fx.passes.sites import find_sites, float_remainder
from fmpq_fx.passes.trace import check_trace, trace

Make = Callable[[], nn.Module]

PLAIN: dict[str, Make] = {
    "factorized": lambda: zoo.FactorizedPrior(8, 12),
    "factorized-relu": lambda: zoo.FactorizedPriorReLU(8, 12),
    "scale hyperprior": lambda: zoo.ScaleHyperprior(8, 12),
    "mean-scale hyperprior": lambda: zoo.MeanScaleHyperprior(8, 12),
    "mbt2018": lambda: zoo.JointAutoregressiveHierarchicalPriors(8, 12),
    "cheng2020-anchor": lambda: zoo.Cheng2020Anchor(8),
    "cheng2020-attention": lambda: zoo.Cheng2020Attention(8),
}
WITH_CODEC: dict[str, Make] = {
    "elic-official": lambda: zoo.Elic2022Official(8, 16, groups=[2, 2, 4, 8]),
    "elic-chandelier": lambda: zoo.Elic2022Chandelier(8, 16, groups=[2, 2, 4, 8]),
    "cheng2020-checkerboard": lambda: zoo.Cheng2020AnchorCheckerboard(12),
}

each_model = pytest.mark.parametrize("make", (PLAIN | WITH_CODEC).values(), ids=PLAIN | WITH_CODEC)
each_codec = pytest.mark.parametrize("make", WITH_CODEC.values(), ids=WITH_CODEC)


def lively(make: Make) -> nn.Module:
    """Return a model whose latents are not all rounded to zero, as they are after plain initialization."""
    torch.manual_seed(0)
    model = make()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    return model.eval()


def photos(count: int = 2, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return all outputs of ``model``, flat; ``x`` itself is not handed to it, lest it be overwritten."""
    with torch.no_grad():
        output = model(x.clone())
    return {"x_hat": output["x_hat"], **output["likelihoods"]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@each_model
def test_the_graph_computes_what_the_model_computes(make: Make) -> None:
    model, x = lively(make), photos()
    expected = outputs(model, x)
    assert not torch.equal(*expected["x_hat"]), "the latents carry nothing, so equality would show nothing"
    gm = trace(model)
    assert_same(outputs(gm, x), expected)
    functionalize(gm)
    gm.graph.lint()
    assert_same(outputs(gm, x), expected)
    check_trace(model, gm, x)


@each_model
def test_the_model_is_left_as_it_was(make: Make) -> None:
    model = lively(make).train()
    model.get_submodule("g_s").eval()  # frozen, as in partial fine-tuning
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    inplace = {name: getattr(m, "inplace", None) for name, m in model.named_modules()}
    gm = functionalize(trace(model))
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
    model = lively(make)
    gm = functionalize(trace(model))
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


class Keeping(fx.Interpreter):
    """Keeps a copy of every value beside the value itself."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.copies = {**getattr(self, "copies", {}), n: (value, copy.deepcopy(value))}
        return value


def assert_no_value_changes(gm: fx.GraphModule, x: Tensor) -> None:
    interpreter = Keeping(gm)
    with torch.no_grad():
        interpreter.run(x)
    for node, (value, before) in interpreter.copies.items():
        assert not isinstance(value, Tensor) or torch.equal(value, before), node


@each_model
def test_no_value_of_a_functionalized_graph_changes_once_computed(make: Make) -> None:
    assert_no_value_changes(functionalize(trace(lively(make))), photos(1))


@each_model
def test_training_adds_the_very_noise_that_the_model_adds(make: Make) -> None:
    """Tracing in evaluation mode would leave rounding in an autoregressive model's graph, and no gradient."""
    model, x = lively(make), photos(1)
    gm = functionalize(trace(model))
    torch.manual_seed(2)
    expected = outputs(model.train(), x)
    torch.manual_seed(2)
    assert_same(outputs(gm.train(), x), expected)


@each_codec
def test_sites_inside_an_opaque_codec_belong_to_its_node(make: Make) -> None:
    gm = functionalize(trace(lively(make)))
    inside = {site.name: site for site in find_sites(gm) if site.name.startswith("latent_codec.")}
    (node,) = [n for n in gm.graph.nodes if n.target == "latent_codec"]
    assert "latent_codec.hyper.h_a.0" in inside
    assert any(site.kind == "CheckerboardMaskedConv2d" for site in inside.values())
    assert {site.node for site in inside.values()} == {node.name}
    assert node.meta["fmpq"]["sites"] == tuple(inside)


@pytest.mark.parametrize(
    "kind", ["ScaleHyperprior", "MeanScaleHyperprior", "JointAutoregressiveHierarchicalPriors"]
)
def test_a_model_that_cannot_be_traced_gets_module_line_and_remedy(kind: str) -> None:
    with pytest.raises(FmpqError) as caught:
        trace(getattr(vbr, f"{kind}Vbr")(8, 12))
    message = str(caught.value)
    assert f"{kind}Vbr cannot be traced: the forward of {kind}Vbr" in message
    assert re.search(r"vbr\.py:\d+: \S", message), "no source line"
    assert "torch.where" in message
    assert "LatentCodec" in message


class Codec(nn.Module):
    """A user's own model, registered nowhere; ``analysis`` is what a test wants to see traced."""

    def __init__(self, analysis: Callable[[Any, Any], Any] = lambda m, x: m.conv(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.analysis = analysis
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.shift = nn.Parameter(torch.zeros(1))
        self.prior = EntropyBottleneck(3)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.prior(20 * self.analysis(self, x))
        return {"x_hat": self.last(y_hat), "likelihoods": {"y": likelihoods}}


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


def test_the_innermost_module_and_the_users_line_are_named() -> None:
    model = Codec()
    model.conv = nn.Sequential(nn.Conv2d(3, 3, 1), Branch())  # type: ignore[assignment]
    with pytest.raises(FmpqError) as caught:
        trace(model)
    assert "module 'conv.1' (Branch)" in str(caught.value)
    assert re.search(r"test_trace\.py:\d+: return x if x\.mean\(\) > 0 else -x", str(caught.value))


def test_a_layer_that_runs_twice_is_one_site_with_two_nodes() -> None:
    gm = trace(Codec(lambda m, x: m.conv(m.conv(x))))
    assert [(site.name, site.node) for site in find_sites(gm)] == [("conv", "conv"), ("last", "last")]
    noted = [n.target for n in gm.graph.nodes if n.meta.get("fmpq", {}).get("sites") == ("conv",)]
    assert noted == ["conv", "conv"]


def test_a_functional_convolution_stays_float_and_is_counted_so() -> None:
    model = Codec(lambda m, x: F.conv2d(x, m.conv.weight, padding=1) + m.shift).eval()
    gm = functionalize(trace(model))
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


INPLACE: dict[str, Callable[[Any, Any], Any]] = {
    "relu(inplace=True)": lambda m, y: F.relu(y, inplace=True),
    "leaky_relu(y, 0.3, True)": lambda m, y: F.leaky_relu(y, 0.3, True),
    "nn.ReLU": lambda m, y: m.relu(y),
    "clamp_": lambda m, y: y.clamp_(min=0),
    "torch.relu_": lambda m, y: torch.relu_(y),
    "F.elu_": lambda m, y: F.elu_(y),
    "chain": lambda m, y: m.relu(y.mul_(2)).add_(1),
}


@pytest.mark.parametrize("change", INPLACE.values(), ids=INPLACE)
def test_what_reads_an_overwritten_value_reads_the_result(change: Callable[[Any, Any], Any]) -> None:
    def analysis(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.conv(x)
        before = y * 3
        z: Tensor = before + change(m, y) + 5 * y
        return z

    model, x = Codec(analysis).eval(), photos()
    gm = functionalize(trace(model))
    assert_same(outputs(gm, x), outputs(model, x))
    assert_no_value_changes(gm, x)


DIFFICULT: dict[str, Callable[[Any, Any], Any]] = {
    "discarded": lambda m, x: [y := m.conv(x), y.relu_(), y][-1],
    "input": lambda m, x: m.conv(x.sub_(0.5)),
}


@pytest.mark.parametrize("analysis", DIFFICULT.values(), ids=DIFFICULT)
def test_in_place_operations_that_leave_no_result(analysis: Callable[[Any, Any], Any]) -> None:
    model, x = Codec(analysis).eval(), photos()
    check_trace(model, functionalize(trace(model)), x)
    assert torch.equal(x, photos()), "the caller's images were overwritten"


def test_a_diverged_model_is_told_so() -> None:
    model = Codec().eval()
    nn.init.constant_(model.last.weight, float("nan"))
    gm = functionalize(trace(model))
    check_trace(model, gm, photos())  # no complaint of the trace, which is right
    with pytest.raises(FmpqError, match=r"9 of 9 values of last\.weight are NaN"):
        find_sites(gm)


FROZEN: dict[str, Callable[[Any, Any], Any]] = {
    "type": lambda m, x: m.conv(x) * (1 if type(x) is Tensor else 2),
    "constant": lambda m, x: m.conv(x + torch.rand(1)),
    "view": lambda m, x: [y := m.conv(x), v := y[:, :1].relu_(), y + v][-1],
}


@pytest.mark.parametrize("analysis", FROZEN.values(), ids=FROZEN)
def test_a_graph_that_computes_something_else_is_refused(analysis: Callable[[Any, Any], Any]) -> None:
    model = Codec(analysis).eval()
    with pytest.raises(FmpqError, match="does not compute what the model computes"):
        check_trace(model, functionalize(trace(model)), photos())


REFUSED: dict[str, Callable[[Any], Any]] = {
    "likelihoods": lambda out: {"x_hat": out["x_hat"]},
    "'likelihoods'": lambda out: out["x_hat"],
    "no likelihoods": lambda out: {**out, "likelihoods": {}},
    "multiples of its stride": lambda out: {**out, "x_hat": out["x_hat"][..., 1:]},
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED)
def test_an_output_that_has_no_rd_loss_is_refused(words: str, change: Callable[[Any], Any]) -> None:
    class Changed(Codec):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return change(super().forward(x))  # type: ignore[no-any-return]

    model = Changed().eval()
    with pytest.raises(FmpqError, match=words):
        check_trace(model, trace(model), photos())


def test_images_that_do_not_suit_the_stride_are_refused_with_their_size() -> None:
    model = lively(PLAIN["mean-scale hyperprior"])
    for size in (8, 72):
        with pytest.raises(FmpqError, match=rf"(?s){size}.*multiple"):
            check_trace(model, trace(model), photos(1, size))


def test_what_has_no_out_of_place_form_is_named() -> None:
    with pytest.raises(FmpqError, match=r"zero_.*no out-of-place form"):
        functionalize(trace(Codec(lambda m, x: m.conv(x).zero_()).eval()))


def test_a_forward_that_decides_on_training_is_warned_of() -> None:
    def analysis(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.conv(x)
        return y + torch.rand_like(y) - 0.5 if m.training else torch.round(y)

    with pytest.warns(UserWarning, match=r"Codec does something else in training(.|\n)*test_trace\.py"):
        trace(Codec(analysis))


@pytest.mark.filterwarnings("error")
@each_model
def test_compressais_own_models_train_as_graphs_without_a_warning(make: Make) -> None:
    trace(make())


def test_what_wraps_a_model_is_told_apart() -> None:
    with pytest.raises(FmpqError, match=r"DataParallel only hands out copies.*model\.module"):
        trace(nn.DataParallel(zoo.ScaleHyperprior(8, 12)))


def test_two_layers_with_one_weight_are_refused() -> None:
    model = zoo.ScaleHyperprior(8, 12).eval()
    model.h_a[4].weight = model.h_a[2].weight
    with pytest.raises(FmpqError, match=r"'h_a\.2' and 'h_a\.4' share one weight tensor"):
        find_sites(trace(model))
