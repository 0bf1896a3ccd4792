"""The model file: what it brings back computes and codes as what was saved, bit for bit, and it is small."""

import copy
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, Sensitivity, convert, load, load_codec, plan_of, save
from fmpq_fx.history import History, Settings, Validation
from fmpq_fx.passes.annotation import annotate_graph, graph_note
from fmpq_fx.passes.plan.task import make_plan
from fmpq_fx.storage import fingerprint
from support import TESTS
from support.coded_models import elic
from support.small_models import small_model
from support.traced_models import WITH_CODEC, Codec, Make, assert_same, lively, outputs, photos
from support.trained_graphs import Own, trained

OF_THE_ZOO: dict[str, Callable[[], fx.GraphModule]] = {
    "bmshj2018-hyperprior": lambda: trained(small_model("bmshj2018-hyperprior")),
    "mbt2018-mean": lambda: trained(small_model("mbt2018-mean")),
    "mbt2018": lambda: trained(small_model("mbt2018")),
    "cheng2020-anchor-checkerboard": lambda: trained(lively(WITH_CODEC["cheng2020-checkerboard"])),
    "float activations": lambda: trained(small_model("mbt2018"), None),
    "float and wide sites": lambda: trained(
        small_model("mbt2018-mean"), 16, g_a0=None, g_a1=None, g_s6=16, g_a3=16
    ),
    "all float": lambda: trained(small_model("mbt2018-mean"), None, None),
    "float64": lambda: trained(small_model("bmshj2018-hyperprior").double(), g_a0=16, g_a1=16),
}
OTHERS: dict[str, Make] = {
    "elic": elic,  # whose groups are in no tensor
    "own": Own,
}


class Saved(NamedTuple):
    gm: fx.GraphModule
    path: Path
    model: Make | None  # what load() needs to be told
    x: Tensor


@pytest.fixture(scope="module", params=[*OF_THE_ZOO, *OTHERS])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    make = OTHERS.get(request.param)
    gm = OF_THE_ZOO[request.param]() if make is None else trained(lively(make))
    path = tmp_path_factory.mktemp("saved") / "model.fmpq"
    before = copy.deepcopy(gm.state_dict())
    save(gm, path)
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items()), "saving changed it"
    return Saved(gm, path, make, photos().to(next(gm.parameters()).dtype))


@pytest.fixture(scope="module")
def hyperprior() -> fx.GraphModule:
    return trained(small_model("bmshj2018-hyperprior"))


@pytest.fixture
def gm(hyperprior: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(hyperprior)


@pytest.fixture(scope="module")
def path(hyperprior: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save(hyperprior, path := tmp_path_factory.mktemp("hyperprior") / "model.fmpq")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save(trained(Own()), path := tmp_path_factory.mktemp("own") / "model.fmpq")
    return path


def test_a_graph_comes_back_bit_for_bit(saved: Saved, tmp_path: Path) -> None:
    loaded = load(saved.path, model=saved.model)
    assert_same(outputs(loaded, saved.x), outputs(saved.gm, saved.x))
    assert plan_of(loaded) == plan_of(saved.gm)
    assert not loaded.training
    save(loaded, tmp_path / "again.fmpq")
    assert (tmp_path / "again.fmpq").read_bytes() == saved.path.read_bytes()


def test_a_codec_comes_back_bit_for_bit(saved: Saved) -> None:
    expected: Any = convert(saved.gm)
    if saved.model is not None:
        with pytest.raises(FmpqError, match="pass model="):
            load_codec(saved.path)
    codec: Any = load_codec(saved.path, model=saved.model)
    assert type(codec) is type(expected)
    assert not codec.training
    assert_same(outputs(codec, saved.x), outputs(expected, saved.x))
    if hasattr(codec, "compress"):
        with torch.no_grad():
            mine, other = codec.compress(saved.x), expected.compress(saved.x)
            assert mine["strings"] == other["strings"]
            decoded = [c.decompress(mine["strings"], mine["shape"])["x_hat"] for c in (codec, expected)]
        assert torch.equal(*decoded)
    assert fingerprint.of_codec(codec) == fingerprint.of_codec(expected)


class RecomputedError(Exception):
    pass


def test_the_tables_of_a_file_are_kept_until_the_entropy_models_are_trained(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RecomputedError

    monkeypatch.setattr(EntropyModel, "_pmf_to_cdf", fail)
    monkeypatch.setattr(EntropyBottleneck, "update", fail)
    monkeypatch.setattr(GaussianConditional, "update", fail)
    codec: Any = load_codec(path)
    codec.compress(photos())
    gm = load(path)
    with torch.no_grad():
        gm.get_parameter("g_a.0.layer.weight").mul_(1.1)
        convert(gm)
        gm.get_parameter("entropy_bottleneck.quantiles").add_(0.5)
        with pytest.raises(RecomputedError):
            convert(gm)


def tables(codec: nn.Module) -> list[Tensor]:
    return [value for name, value in codec.state_dict().items() if name.endswith("_quantized_cdf")]


def test_tables_that_come_out_otherwise_here_are_those_of_the_file(
    gm: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, make = tables(convert(gm)), EntropyModel._pmf_to_cdf

    def elsewhere(self: EntropyModel, pmf: Tensor, tail: Tensor, lengths: Tensor, longest: int) -> Tensor:
        table: Tensor = make(self, pmf, tail, lengths, longest)
        for row, length in zip(table, (lengths + 2).tolist(), strict=True):
            row[:length] = 2**16 - row[:length].flip(0)
        return table

    monkeypatch.setattr(EntropyModel, "_pmf_to_cdf", elsewhere)
    save(gm, tmp_path / "model.fmpq")
    there = tables(convert(gm))
    monkeypatch.undo()
    assert not any(torch.equal(mine, other) for mine, other in zip(here, there, strict=True))
    for codec in (load_codec(tmp_path / "model.fmpq"), convert(load(tmp_path / "model.fmpq"))):
        assert all(torch.equal(mine, other) for mine, other in zip(tables(codec), there, strict=True))


def test_the_history_of_fine_tuning_is_kept_with_losses_to_four_digits(
    gm: fx.GraphModule, tmp_path: Path
) -> None:
    validation = (Validation(0, 0.123456789, 0.01, 1.5), Validation(2, 0.1, 0.01, 1.4))
    history = History(Settings(0.01), "a", "b", (1.23456, 0.000123456), validation, "remarks")
    annotate_graph(gm, history=history)
    save(gm, tmp_path / "model.fmpq")
    assert graph_note(load(tmp_path / "model.fmpq")).history == replace(history, losses=(1.235, 0.0001235))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_trained_model_is_smaller_than_its_bits(bits: int, tmp_path: Path) -> None:
    table = Sensitivity.load(TESTS / "data" / "bmshj2018-hyperprior.json")
    plan = make_plan(table, bits / 32, planner="uniform", bits=[bits], activation_bits=None)
    save(fmpq_fx.rewrite(fmpq_fx.samples.model(), plan), tmp_path / "model.fmpq")
    # With all tables, steps and the plan it takes less than the weights, and what stays float, would uncoded.
    most = plan.nominal_bytes + 4 * sum(plan.float_remainder.values())
    assert (tmp_path / "model.fmpq").stat().st_size < most


def test_nothing_is_unpickled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, fail)
    load(path)
    load_codec(path)


def test_what_was_loaded_can_be_trained_on_and_saved_again(path: Path, tmp_path: Path) -> None:
    gm = load(path).train()
    gm(photos())["x_hat"].square().sum().backward()
    weight = gm.get_parameter("g_s.6.layer.weight")
    assert weight.grad is not None
    assert weight.grad.count_nonzero() > 0
    with torch.no_grad():
        weight.sub_(weight.grad, alpha=0.1 / float(weight.grad.abs().max()))
    save(gm, tmp_path / "next.fmpq")
    assert gm.training, "saving left it in another mode"
    assert (tmp_path / "next.fmpq").read_bytes() != path.read_bytes()
    assert_same(outputs(load(tmp_path / "next.fmpq"), photos()), outputs(gm.eval(), photos()))


def test_a_model_that_is_not_of_the_zoo_needs_to_be_told(own: Path) -> None:
    with pytest.raises(
        FmpqError, match=r"model.fmpq: it holds a support\.trained_graphs\.Own, which.*pass model="
    ):
        load(own)


def test_the_model_that_is_passed_is_not_modified(own: Path) -> None:
    given = Own()
    before = copy.deepcopy(given.state_dict())
    codec = load_codec(own, model=given)
    assert_same(outputs(codec, photos()), outputs(load_codec(own, model=Own), photos()))
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())
    assert type(given.conv) is nn.Conv2d


@pytest.mark.parametrize("model", [Codec, lambda: small_model("mbt2018"), lambda: 3, nn.Identity])
def test_a_model_of_another_architecture_is_refused(own: Path, path: Path, model: Make) -> None:
    for file, action in ((own, load), (path, load), (path, load_codec)):
        with pytest.raises(
            FmpqError, match=r"model\.fmpq: (its tensors are not those|model= made a int)"
        ) as caught:
            action(file, model=model)
        assert len(str(caught.value)) < 600, "a few names of each side, not all of them"


def test_what_cannot_make_a_model_is_refused(own: Path) -> None:
    with pytest.raises(TypeError, match="model= is a int; pass a model, or what makes one"):
        load(own, model=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyError("width"), RuntimeError("no weights"), FmpqError("no such class")])
def test_what_the_users_own_code_raises_is_no_damage(own: Path, error: Exception) -> None:
    def make() -> nn.Module:
        raise error

    for action in (load, load_codec):
        with pytest.raises(type(error)) as caught:
            action(own, model=make)
        assert caught.value is error
        if sys.version_info >= (3, 11):
            assert "model.fmpq" in error.__notes__[-1]
            assert "make" in error.__notes__[-1]


def test_numbers_of_every_type_come_back_as_they_are(tmp_path: Path) -> None:
    model = Own().eval()
    model.mean = torch.tensor(1 / 3, dtype=torch.float64)
    gm = trained(model)
    save(gm, tmp_path / "model.fmpq")
    codec = load_codec(tmp_path / "model.fmpq", model=model)
    assert codec.mean.dtype == torch.float64
    assert_same(dict(codec.named_buffers()), dict(convert(gm).named_buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8, 10])
def test_a_model_in_half_precision_comes_back_or_is_refused(
    dtype: torch.dtype, bits: int, tmp_path: Path
) -> None:
    gm = trained(small_model("mbt2018-mean").to(dtype), None, bits)
    try:
        save(gm, tmp_path / "model.fmpq")
    except FmpqError:
        return
    assert_same(outputs(load(tmp_path / "model.fmpq"), photos().to(dtype)), outputs(gm, photos().to(dtype)))


def test_what_cannot_be_brought_back_is_not_written(gm: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(FmpqError, match="carries no plan"):
        save(fx.symbolic_trace(nn.Identity()), tmp_path / "model.fmpq")
    gm.get_submodule("g_s.6.input_quantizer").observe()  # type: ignore[operator]
    with pytest.raises(FmpqError, match=r"activations of 'g_s\.6' are not calibrated"):
        save(gm, tmp_path / "model.fmpq")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save(trained(Own()), tmp_path / "absent" / "model.fmpq")
    assert list(tmp_path.iterdir()) == []
