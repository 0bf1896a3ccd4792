"""What lies on the entropy path: what there is exact, and codes under one setting for every other, and what is not."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import GaussianConditional
from compressai.latent_codecs import HyperLatentCodec
from compressai.layers import GDN, MaskedConv2d
from compressai.models import MeanScaleHyperprior
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.exact import ExactLayer, ExactLeakyReLU
from fmpq_fx.passes.lower.entropy_path import entropy_path
from support.coded_models import graph_of, latents, lively
from support.hyperpriors import Hyperprior, LatentsAdded


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def checkered(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x`` with every other place of ``y`` put in, and -0.5 in one channel."""
    x = x.clone()
    x[:, :, ::2, ::2] = y[:, :, ::2, ::2]
    x[:, :, 1::2, 1::2] = y[:, :, 1::2, 1::2]
    x[:, 3] = -0.5
    return x


def assigned(x: Tensor, value: Tensor | float) -> Tensor:
    """Return ``x`` with another channel."""
    x = x.clone()
    x[:, 3] = value
    return x


EXACT: dict[str, Callable[[], nn.Module]] = {
    "nothing": lambda: Hyperprior(lambda m, x: x),
    "slices": lambda: Hyperprior(lambda m, x: torch.cat([x[:, 12:].relu(), x[:, :12].abs()], dim=1)),
    "a residual": lambda: Hyperprior(lambda m, x: x + m.more(x), more=nn.Conv2d(24, 24, 1)),
    "residuals of residuals": lambda: Hyperprior(
        lambda m, x: (y := x + m.more(x)) + m.more(y) - x + 0.5, more=nn.Conv2d(24, 24, 1)
    ),
    "layers called by name": lambda: Hyperprior(
        lambda m, x: m.more(input=m.act(input=x)), more=nn.Conv2d(24, 24, 1), act=nn.LeakyReLU()
    ),
    "a constant": lambda: Hyperprior(lambda m, x: x + 0.25),
    "a crop": lambda: Hyperprior(lambda m, x: x[:, :, : x.size(2), : x.shape[3]]),
    "a crop of a size that is computed": lambda: Hyperprior(lambda m, x: x[:, :, : x.size(2) * 2 // 2 + 0]),
    "a parameter": lambda: Hyperprior(lambda m, x: x + m.offset),
    "a parameter of each channel": lambda: Hyperprior(
        lambda m, x: torch.maximum(x, m.shift.view(1, -1, 1, 1)) - m.shift[:, None, None],
        shift=nn.Parameter(torch.linspace(-1, 1, 24)),
    ),
    "a mask": lambda: Hyperprior(
        lambda m, x: x * m.mask + m.more(x * (1 - m.mask)),
        mask=(torch.arange(24) % 2).view(1, -1, 1, 1).float(),
        more=nn.Conv2d(24, 24, 1),
    ),
    "products": lambda: Hyperprior(lambda m, x: -3 * (x * 0.5) * 2 - x / 2 * 4),
    "a product that a layer reads": lambda: Hyperprior(lambda m, x: m.more(x / 8), more=nn.Conv2d(24, 24, 1)),
    "a choice": lambda: Hyperprior(
        lambda m, x: torch.where(m.mask, x, x.relu()).masked_fill(m.mask, 0.5),
        mask=(torch.arange(24) % 2 == 0).view(1, -1, 1, 1),
    ),
    "a clamp": lambda: Hyperprior(lambda m, x: x.clamp(min=-2, max=1.5)),
    "padding": lambda: Hyperprior(
        lambda m, x: F.pad(F.pad(x, (1, 1, 2, 0), value=0.5)[:, :, 1:], (-1, -1, -1, 0), mode="constant"),
    ),
    "padding by modules": lambda: Hyperprior(
        lambda m, x: m.pad(x)[:, :, 3:-3, 3:-3],
        pad=nn.Sequential(nn.ReplicationPad2d(1), nn.ReflectionPad2d(1), nn.ZeroPad2d(1)),
    ),
    "items that are assigned": lambda: Hyperprior(
        lambda m, x: checkered(x, x.relu() + m.more(x)), more=nn.Conv2d(24, 24, 1)
    ),
    "float layers": lambda: Hyperprior(lambda m, x: m.more(x), more=nn.Conv2d(24, 24, 3, padding=1)),
}

INEXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softplus": (
        lambda: Hyperprior(lambda m, x: F.softplus(x)),
        r"'softplus' \(.*softplus.*has no exact form",
    ),
    "a GDN": (lambda: Hyperprior(lambda m, x: m.norm(x), norm=GDN(24)), r"'norm' \(GDN\) has no exact form"),
    "a SiLU": (lambda: Hyperprior(lambda m, x: m.act(x), act=nn.SiLU()), r"'act' \(SiLU\) has no exact form"),
    "a large parameter": (
        lambda: Hyperprior(lambda m, x: x + m.large, large=nn.Parameter(torch.full((1,), 300.0))),
        "'large' has values beyond 256",
    ),
    "a size": (lambda: Hyperprior(lambda m, x: x + x.size(2)), "'add' .* size is no fixed-point number"),
    "a fine constant": (lambda: Hyperprior(lambda m, x: x + 0.1), "'add' .* has no exact form"),
    "a large constant": (lambda: Hyperprior(lambda m, x: x + 1000), "'add' .* has no exact form"),
    "very many terms": (
        lambda: Hyperprior(lambda m, x: functools.reduce(lambda y, _: y + y, range(5), x)),
        "'add_4' .* adds up 32 outputs of layers",
    ),
    "latents": (lambda: LatentsAdded(lambda m, x: x), "adds up latents themselves"),
    "a product by many bits": (
        lambda: Hyperprior(lambda m, x: x * 0.3),
        "'mul' .* only constants of few bits multiply",
    ),
    "a product by a parameter": (lambda: Hyperprior(lambda m, x: x * m.offset), "'mul' .* has no exact form"),
    "a product of two layers": (lambda: Hyperprior(lambda m, x: x * x), "'mul' .* has no exact form"),
    "a large product": (
        lambda: Hyperprior(lambda m, x: x * 17),
        "'mul' .* takes 17 times",
    ),
    "halves as means": (
        lambda: Hyperprior(lambda m, x: x * 0.5),
        "is finer than 2\\^-12, since it was scaled",
    ),
    "a quotient": (lambda: Hyperprior(lambda m, x: x / 3), "'truediv' .* has no exact form"),
    "a clamp between numbers": (
        lambda: Hyperprior(lambda m, x: x.clamp(min=0.11)),
        "'clamp' .* 0.11 is no fixed-point number up to 256",
    ),
    "items that are no fixed-point numbers": (
        lambda: Hyperprior(lambda m, x: assigned(x, 0.1)),
        "'set_item' .* 0.1 is no fixed-point number",
    ),
    "items that have no exact form": (
        lambda: Hyperprior(lambda m, x: assigned(x, x[:, 3].sigmoid())),
        "'sigmoid' .* has no exact form",
    ),
    "padding with what is between numbers": (
        lambda: Hyperprior(lambda m, x: F.pad(x, (1, 1, 1, 1), value=0.1)[..., 1:-1, 1:-1]),
        "'pad' .* 0.1 is no fixed-point number",
    ),
    "a mean": (
        lambda: Hyperprior(lambda m, x: x.mean((2, 3), keepdim=True) + x),
        "'mean' .* adds up too many",
    ),
    "an output size": (
        lambda: Hyperprior(
            lambda m, x: m.last(x, output_size=x.shape[2:]), last=nn.ConvTranspose2d(24, 24, 3, 1, 1)
        ),
        "'last' is called with an output size",
    ),
    "a masked convolution": (
        lambda: Hyperprior(lambda m, x: m.masked(x), masked=MaskedConv2d(24, 24, 5, padding=2)),
        "'masked' is a masked convolution",
    ),
}


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_what_moves_and_adds_fixed_point_numbers_is_exact(make: Callable[[], nn.Module]) -> None:
    gm = graph_of(make(), images(), None)
    model: Any = fmpq_fx.convert(gm, exact="require")
    with torch.no_grad():
        coded = model.compress(images())
        params = model.h_s(torch.randn(1, 8, 4, 4))
    assert torch.equal(params * 4096, (params * 4096).round())
    assert torch.equal(latents(copy.deepcopy(model).double(), coded), latents(model, coded))


def test_sums_of_saturated_numbers_are_the_same_in_every_type() -> None:
    model: Any = EXACT["residuals of residuals"]()
    with torch.no_grad():
        for layer in (model.more, model.h_s[0][4]):
            layer.bias.uniform_(2000, 4000)
    exact: Any = fmpq_fx.convert(graph_of(model, images(), None), exact="require")
    h_s = exact.h_s
    z_hat = 3 * torch.randn(1, 8, 4, 4).round()
    with torch.no_grad():
        params = h_s(z_hat)
        assert torch.equal(params.double(), copy.deepcopy(h_s).double()(z_hat.double()))
    assert params.abs().max() > 800
    assert torch.equal(params * 4096, (params * 4096).round())


@pytest.mark.parametrize(("make", "says"), INEXACT.values(), ids=INEXACT)
def test_what_has_no_exact_form_is_named(make: Callable[[], nn.Module], says: str) -> None:
    gm = graph_of(make().eval(), images())
    with pytest.raises(FmpqError, match=says):
        fmpq_fx.convert(gm, exact="require")
    with pytest.warns(UserWarning, match=says):
        kept: Any = fmpq_fx.convert(gm)
    assert not any(isinstance(module, ExactLayer | ExactLeakyReLU) for module in kept.modules())


def test_what_has_no_exact_form_codes_all_the_same() -> None:
    make, says = INEXACT["a SiLU"]
    gm = graph_of(make().eval(), images())
    with pytest.warns(UserWarning, match=says):
        kept: Any = fmpq_fx.convert(gm)
    with torch.no_grad():
        coded = kept.compress(images())
        kept.decompress(coded["strings"], coded["shape"])
        assert torch.equal(kept(images())["x_hat"], fmpq_fx.convert(gm, exact=False)(images())["x_hat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmpq_fx.convert(gm, exact=False)


def test_of_many_obstacles_some_are_named() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(24, 24, 1), nn.GELU()) for _ in range(11)))
    model = Hyperprior(lambda m, x: torch.stack([block(x) for block in m.blocks]).amax(0), blocks=blocks)
    with pytest.raises(FmpqError, match=r"'blocks.\d+.1' \(GELU\) has no exact form") as error:
        fmpq_fx.convert(graph_of(model.eval(), images()), exact="require")
    assert str(error.value).count("GELU") == 8
    assert str(error.value).endswith("; and 3 more")


def test_a_module_that_is_called_off_the_path_as_well() -> None:
    model = MeanScaleHyperprior(8, 12)
    model.h_a[1] = model.h_s[1]
    with pytest.raises(FmpqError, match=r"calls 'h_.\.1' off the entropy path as well"):
        fmpq_fx.convert(graph_of(model.eval(), images()), exact="require")


def test_an_entropy_model_and_a_latent_codec_of_the_users_own() -> None:
    class Chooser(GaussianConditional):
        def build_indexes(self, scales: Tensor) -> Tensor:
            indexes: Tensor = super().build_indexes(scales.exp())
            return indexes

    class Hyper(HyperLatentCodec):
        pass

    model = MeanScaleHyperprior(8, 12)
    model.gaussian_conditional = Chooser(None)
    found = entropy_path(graph_of(model.eval(), images()))
    assert "Chooser" in found.obstacles[0]
    other: Any = copy.deepcopy(lively("cheng2020-checkerboard")[0])
    other.latent_codec.hyper.__class__ = Hyper
    assert "'latent_codec.hyper' (Hyper)" in entropy_path(graph_of(other, images())).obstacles[0]


class OwnLikelihoods(MeanScaleHyperprior):
    """A hyperprior that computes the likelihoods of y in another way than by calling its entropy model."""

    def __init__(self, likelihoods: Callable[[Any, Tensor, Tensor, Tensor], Tensor], **modules: nn.Module):
        super().__init__(8, 12)
        torch.manual_seed(0)
        self.likelihoods = likelihoods
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat = self.gaussian_conditional.quantize(y, "noise" if self.training else "dequantize", means)
        y_likelihoods = self.likelihoods(self, y_hat, scales, means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


class Laplace(nn.Module):
    """A user's own likelihoods."""

    def forward(self, y_hat: Tensor, scales: Tensor) -> Tensor:
        return torch.exp(-y_hat.abs() / scales.abs().clamp(min=0.25))


OWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a module": (
        lambda: OwnLikelihoods(lambda m, y_hat, scales, means: m.laplace(y_hat, scales), laplace=Laplace()),
        r"'exp' \(.*exp.* has no exact form: each library rounds it",
    ),
    "a method of an entropy model": (
        lambda: OwnLikelihoods(
            lambda m, y_hat, scales, means: m.gaussian_conditional._likelihood(y_hat, scales, means)
        ),
        r"'erfc' \(.*erfc.* has no exact form",
    ),
}


@pytest.mark.parametrize(("make", "says"), OWN.values(), ids=OWN)
def test_likelihoods_of_the_users_own_lie_on_the_path(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(FmpqError, match=says):
        fmpq_fx.convert(graph_of(make().eval(), images()), exact="require")


def test_what_is_computed_from_an_entropy_models_likelihoods_decides_nothing() -> None:
    class Clamped(MeanScaleHyperprior):
        def forward(self, x: Tensor) -> dict[str, Any]:
            output: dict[str, Any] = super().forward(x)
            return {**output, "likelihoods": {n: v.log().exp() for n, v in output["likelihoods"].items()}}

    path = entropy_path(graph_of(Clamped(8, 12).eval(), images()))
    assert not path.obstacles
    assert path.layers
