"""The model file: what it brings back computes and codes as what was saved, bit for bit, and it is small."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from conftest import SMALL, small_model
from test_layers import CASES, effective, made, output_channels
from torch import Tensor, fx, nn
from traced_models import WITH_CODEC, Codec, Make, assert_same, lively, outputs, photos

import fmpq_fx
from fmpq_fx import FmpqError, Plan, Sensitivity, convert, fingerprint, load, load_codec, plan_of, save
from fmpq_fx.history import History, Settings, Validation
from fmpq_fx.passes.functionalize import functionalize
from fmpq_fx.passes.plan import make_plan
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import quantize_layer

DATA = Path(__file__).parent / "data"


def trained(model: nn.Module, activation_bits: int | None = 8, **fixed: int | None) -> fx.GraphModule:
    """Return a rewritten graph whose weights, steps and zero points are not those of its plan any more."""
    gm = functionalize(trace(model))
    sites = find_sites(gm)
    names = [site.name for site in sites]
    bits = {name: (3, 4, 5, 8)[n % 4] for n, name in enumerate(names)}
    zeta = {name: {4: 0.1, 8: 0.01} for name in names}
    plan = Plan(
        sites,
        {**bits, **{name.replace("__", "."): width for name, width in fixed.items()}},
        activation_bits,
        0.5,
        "uniform",
        Sensitivity(sites, 0.01, 0.5, 0.5, zeta, zeta, {"bias": 8}, "no images at all"),
        clips={names[0]: 0.9},
        ranges=dict.fromkeys(names, (-1.5, 2.25)) if activation_bits else {},
    )
    gm = quantize(gm, plan)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in gm.parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.01)
    return gm.eval()


class Own(Codec):
    """A user's model: it cannot code, has a layer under two names, and tensors of several types."""

    def __init__(self) -> None:
        super().__init__(lambda model, x: model.twin(x) + model.conv(x + model.mean.to(x.dtype)))
        self.twin = self.conv
        self.register_buffer("mean", torch.tensor(1 / 3))
        self.register_buffer("seen", torch.tensor([2**40, -1]))
        self.register_buffer("used", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0, 3))


Graph = Callable[[], fx.GraphModule]

OF_THE_ZOO: dict[str, Graph] = {
    **{name: lambda name=name: trained(small_model(name)) for name in SMALL},  # type: ignore[misc]
    "float activations": lambda: trained(small_model("mbt2018"), None),
    "float and 16-bit sites": lambda: trained(
        small_model("mbt2018-mean"), g_a__0=None, g_a__1=None, g_s__6=16, g_a__3=16, h_s__4=2
    ),
    "all float": lambda: trained(
        small_model("mbt2018-mean"), None, **{site.replace(".", "__"): None for site in SITES}
    ),
    "16-bit activations": lambda: trained(small_model("bmshj2018-hyperprior"), 16),
    "float64": lambda: trained(small_model("bmshj2018-hyperprior").double(), g_a__0=16, g_a__1=16),
}
SITES = [
    *(f"g_a.{n}" for n in range(7)),
    *(f"h_a.{n}" for n in (0, 2, 4)),
    *(f"h_s.{n}" for n in (0, 2, 4)),
    *(f"g_s.{n}" for n in range(7)),
]
OTHERS: dict[str, Make] = {**WITH_CODEC, "own": Own}


@dataclass(frozen=True)
class Saved:
    gm: fx.GraphModule
    path: Path
    model: Make | None  # what load() needs to be told
    x: Tensor


@pytest.fixture(scope="module", params=[*OF_THE_ZOO, *OTHERS])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    make = OTHERS.get(request.param)
    gm = OF_THE_ZOO[request.param]() if make is None else trained(lively(make))
    path = tmp_path_factory.mktemp("saved") / "model.fmpq"
    save(gm, path)
    return Saved(gm, path, make, photos().to(next(gm.parameters()).dtype))


@pytest.fixture(scope="module")
def hyperprior() -> fx.GraphModule:
    return trained(small_model("bmshj2018-hyperprior"))


@pytest.fixture
def gm(hyperprior: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(hyperprior)


@pytest.fixture
def path(gm: fx.GraphModule, tmp_path: Path) -> Path:
    save(gm, tmp_path / "model.fmpq")
    return tmp_path / "model.fmpq"


def test_a_graph_comes_back_bit_for_bit(saved: Saved, tmp_path: Path) -> None:
    loaded = load(saved.path, model=saved.model)
    assert_same(outputs(loaded, saved.x), outputs(saved.gm, saved.x))
    assert plan_of(loaded) == plan_of(saved.gm)
    assert not loaded.training
    save(loaded, tmp_path / "again.fmpq")
    assert (tmp_path / "again.fmpq").read_bytes() == saved.path.read_bytes()


def test_a_codec_comes_back_bit_for_bit(saved: Saved) -> None:
    expected: Any = convert(saved.gm)
    codec: Any = load_codec(saved.path, model=saved.model)
    assert type(codec) is type(expected)
    assert not codec.training
    assert_same(outputs(codec, saved.x), outputs(expected, saved.x))
    assert fingerprint.of_codec(codec) == fingerprint.of_codec(expected)
    if hasattr(codec, "compress"):
        with torch.no_grad():
            mine, other = codec.compress(saved.x), expected.compress(saved.x)
            assert mine["strings"] == other["strings"]
            decoded = [c.decompress(mine["strings"], mine["shape"])["x_hat"] for c in (codec, expected)]
        assert torch.equal(*decoded)


class Recomputed(Exception):
    pass


def test_the_tables_of_a_file_are_kept_until_the_entropy_models_are_trained(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Recomputed

    for cls, name in (
        (EntropyModel, "_pmf_to_cdf"), (EntropyBottleneck, "update"), (GaussianConditional, "update")
    ):  # fmt: skip
        monkeypatch.setattr(cls, name, fail)
    codec: Any = load_codec(path)
    codec.compress(photos())
    gm = load(path)
    with torch.no_grad():
        for parameter in gm.get_submodule("g_a").parameters():
            parameter.mul_(1.01)
        convert(gm)
        gm.get_parameter("entropy_bottleneck.quantiles").add_(0.5)
        with pytest.raises(Recomputed):
            convert(gm)


def test_tables_that_come_out_otherwise_here_are_those_of_the_file(gm: fx.GraphModule, tmp_path: Path) -> None:
    update = gm.meta["model"].update

    def elsewhere(force: bool = False) -> None:
        update(force=force)
        table = gm.meta["model"].entropy_bottleneck._quantized_cdf
        table[:, 1] += 1

    codec = convert(gm)
    assert isinstance(codec.entropy_bottleneck, EntropyBottleneck)
    codec.entropy_bottleneck._quantized_cdf[:, 1] += 1
    del update, elsewhere
