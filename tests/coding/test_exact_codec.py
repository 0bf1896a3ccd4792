"""exact= of convert() and load_codec(), what cannot be exact, files, and strings that were damaged."""

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import GaussianConditional
from compressai.latent_codecs import HyperLatentCodec
from compressai.layers import GDN, MaskedConv2d
from compressai.models import JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.exact import ExactLayer, ExactLeakyReLU
from fmpq_fx.passes.lower.entropy_path import entropy_path
from fmpq_fx.storage import fingerprint
from support.coded_models import codec, graph_of, latents, lively, quantized


class Hyperprior(MeanScaleHyperprior):
    """A user's hyperprior: ``between`` comes between h_s and the entropy model, in coding as well."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **modules: nn.Module):
        super().__init__(8, 12)
        torch.manual_seed(0)
        self.between = between
        self.h_s: nn.Module = nn.Sequential(self.h_s, _Between(self))
        self.offset = nn.Parameter(torch.ones(1))
        for name, module in modules.items():
            self.add_module(name, module)


class _Between(nn.Module):
    def __init__(self, model: Hyperprior):
        super().__init__()
        self.model = [model]  # not as a submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.model[0].between(self.model[0], x)


class LatentsAdded(Hyperprior):
    """A hyperprior whose hyper-synthesis ends with the sum of its input and a layer's output."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]):
        super().__init__(between)
        self.h_s = _Added()


class _Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle, self.conv = nn.PixelShuffle(4), nn.ConvTranspose2d(8, 24, 4, 4)

    def forward(self, z_hat: Tensor) -> Tensor:
        shuffled = self.shuffle(z_hat.repeat(1, 2, 1, 1))
        return torch.add(self.conv(z_hat), torch.cat([shuffled] * 24, 1))


EXACT: dict[str, Callable[[], nn.Module]] = {
    "nothing": lambda: Hyperprior(lambda m, x: x),
    "slices": lambda: Hyperprior(lambda m, x: torch.cat([x[:, 12:].relu(), x[:, :12].abs()], dim=1)),
    "a residual": lambda: Hyperprior(lambda m, x: x + m.more(x), more=nn.Conv2d(24, 24, 1)),
    "residuals of residuals": lambda: Hyperprior(
        lambda m, x: (y := x + m.more(x)) + m.more(y) - x + 0.5, more=nn.Conv2d(24, 24, 1)
    ),
    "a constant": lambda: Hyperprior(lambda m, x: x + 0.25),
    "a crop": lambda: Hyperprior(lambda m, x: x[:, :, : x.size(2), : x.shape[3]]),
    "float layers": lambda: Hyperprior(lambda m, x: m.more(x), more=nn.Conv2d(24, 24, 3, padding=1)),
}

INEXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softplus": (
        lambda: Hyperprior(lambda m, x: F.softplus(x)),
        r"'softplus' \(.*softplus.*has no exact form",
    ),
    "a GDN": (lambda: Hyperprior(lambda m, x: m.norm(x), norm=GDN(24)), r"'norm' \(GDN\) has no exact form"),
    "a SiLU": (lambda: Hyperprior(lambda m, x: m.act(x), act=nn.SiLU()), r"'act' \(SiLU\) has no exact form"),
    "a parameter": (lambda: Hyperprior(lambda m, x: x + m.offset), "'offset' is not computed from coded"),
    "a fine constant": (lambda: Hyperprior(lambda m, x: x + 0.1), "'add' .* has no exact form"),
    "a large constant": (lambda: Hyperprior(lambda m, x: x + 1000), "'add' .* has no exact form"),
    "very many terms": (
        lambda: Hyperprior(lambda m, x: functools.reduce(lambda y, _: y + y, range(5), x)),
        "'add_4' .* adds up 32 outputs of layers",
    ),
    "latents": (lambda: LatentsAdded(lambda m, x: x), "adds up latents themselves"),
    "a product": (lambda: Hyperprior(lambda m, x: x * 0.5), "'mul' .* has no exact form"),
    "a masked convolution": (
        lambda: Hyperprior(lambda m, x: m.masked(x), masked=MaskedConv2d(24, 24, 5, padding=2)),
        "'masked' is a masked convolution",
    ),
}


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


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
    with torch.no_grad():
        coded = kept.compress(images())
        kept.decompress(coded["strings"], coded["shape"])
        assert torch.equal(kept(images())["x_hat"], fmpq_fx.convert(gm, exact=False)(images())["x_hat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmpq_fx.convert(gm, exact=False)


def test_a_weight_beyond_fixed_point() -> None:
    model = MeanScaleHyperprior(8, 12)
    nn.init.constant_(model.h_s[4].weight, 1e9)
    with pytest.raises(FmpqError, match=r"'h_s\.4' has no exact form: it multiplies by"):
        fmpq_fx.convert(graph_of(model.eval(), images()), exact="require")


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


def test_coding_loops_of_the_users_own_are_not_replaced() -> None:
    class Own(JointAutoregressiveHierarchicalPriors):
        def _compress_ar(self, *args: Any) -> Any:
            return super()._compress_ar(*args)

    with pytest.raises(FmpqError, match="'context_prediction' is a masked convolution"):
        fmpq_fx.convert(graph_of(Own(12, 12).eval(), images()), exact="require")


def test_exact_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="exact is 'always'; pass True, False"):
        fmpq_fx.convert(quantized("scale hyperprior"), exact="always")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018"])
def test_a_file_gives_the_same_codec(name: str, tmp_path: Path) -> None:
    _, x = lively(name)
    paths = tmp_path / "a.fmpq", tmp_path / "b.fmpq"
    fmpq_fx.save(quantized(name), paths[0])
    gm = fmpq_fx.load(paths[0])
    fmpq_fx.save(gm, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    codecs: list[Any] = [codec(name), fmpq_fx.convert(gm), *map(fmpq_fx.load_codec, paths)]
    assert len(set(map(fingerprint.of_codec, codecs))) == 1
    with torch.no_grad():
        coded = codecs[0].compress(x)
    assert all(torch.equal(latents(other, coded), latents(codecs[0], coded)) for other in codecs)
    floating = fmpq_fx.load_codec(paths[0], exact=False)
    assert not any(isinstance(module, ExactLayer) for module in floating.modules())
    with torch.no_grad():
        assert torch.equal(gm(x)["x_hat"], quantized(name)(x)["x_hat"])


def test_a_file_of_what_has_no_exact_form_says_so(tmp_path: Path) -> None:
    model = INEXACT["softplus"][0]
    gm = graph_of(model().eval(), images())
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    with pytest.warns(UserWarning, match="'softplus'"):
        fmpq_fx.load_codec(tmp_path / "model.fmpq", model=model)
    with pytest.raises(FmpqError, match="'softplus'"):
        fmpq_fx.load_codec(tmp_path / "model.fmpq", model=model, exact="require")


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
def test_damaged_strings_give_a_damaged_image_or_an_error(name: str) -> None:
    _, x = lively(name)
    with torch.no_grad():
        coded = codec(name).compress(x[:1, :, :64, :64])
    for strings in (
        [[string[: len(string) // 2] + bytes(4096)] for (string,) in coded["strings"]],
        [[bytes(b ^ 0x55 for b in string) + bytes(4096)] for (string,) in coded["strings"]],
    ):
        values = latents(codec(name), {**coded, "strings": strings})
        assert values.shape[2:] == (4, 4)
        assert values.isfinite().all()


def test_the_table_says_what_is_summed_in_what() -> None:
    table = fmpq_fx.exact_table(codec("mbt2018")).splitlines()
    (row,) = [line for line in table if "context_prediction" in line]
    assert "-16777215 … 16777215" in row
    assert "float64" in row
    (row,) = [line for line in table if "entropy_parameters.2" in line]
    assert "float32" in row
    assert fmpq_fx.exact_table(lively("mbt2018")[0]).startswith("No layer")
