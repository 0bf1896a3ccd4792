"""Codecs as research writes them: traced at one size, the same at all, trained alike, and taken all the way."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressai.layers import GDN
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.check_trace import check_trace
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.rd import rate_and_distortion
from support.codecs import CODECS
from support.codecs.small import Small
from support.traced_models import assert_same, outputs

each_kind = pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
Make = Callable[[], Small]

ELSEWHERE = ((1, 32, 56), (1, 64, 40), (1, 88, 56), (2, 40, 48))  # images, height, width


def images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count * height + width)
    return torch.rand(count, 3, height, width, generator=generator)


@functools.cache
def traced_once(make: Make) -> fx.GraphModule:
    return trace(make().eval(), images(1, 40, 56))


def traced(make: Make) -> fx.GraphModule:
    """Return a graph of its own."""
    return copy.deepcopy(traced_once(make))


@each_kind
def test_the_graph_of_one_size_computes_what_the_model_does_at_all(make: Make) -> None:
    model, gm = make().eval(), traced(make)
    for size in ((1, 40, 56), *ELSEWHERE):
        x = images(*size)
        expected = outputs(copy.deepcopy(model), x)
        assert expected["x_hat"].std() > 0
        assert_same(outputs(gm, x), expected)
    check_trace(model, gm, images(2, 40, 56))


def gradients(model: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Return the gradients of the RD loss, and the loss, of a copy of ``model``, with the same random numbers."""
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(3)
    loss = torch.stack(rate_and_distortion(twin(x.clone()), x, 0.01)).sum()
    loss.backward()
    found = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@each_kind
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_are_those_of_the_model(make: Make, training: bool) -> None:
    model, gm = make().eval(), traced(make)
    expected = gradients(model, images(2, 32, 56), training)
    found = gradients(gm, images(2, 32, 56), training)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert expected["loss"].isfinite()


def assert_same_loss(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert torch.equal(found["loss"], expected["loss"])
    assert found.keys() == expected.keys()


def layers_of(model: nn.Module) -> set[str]:
    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | GDN
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@each_kind
def test_all_layers_are_sites(make: Make) -> None:
    model = make().eval()
    unused = {"Invertible": {"g_a.0", "g_a.2", "g_s.0", "g_s.2"}}.get(type(model).__name__, set())
    assert {site.name for site in find_sites(traced(make))} == layers_of(model) - unused


@each_kind
@pytest.mark.filterwarnings("ignore:.* keeps floating point on the way to its CDFs")
def test_a_codec_goes_all_the_way(make: Make, tmp_path: Path) -> None:
    model = make().eval()
    x = images(1, 64, 64)
    gm = fmpq_fx.prepare(model, 0.25, calibration=x, planner="uniform", progress=False)
    assert "g_a" in fmpq_fx.bit_table(gm) or isinstance(model, CODECS["Invertible"])  # type: ignore[arg-type]
    fmpq_fx.finetune(
        gm, list(images(2, 64, 64)), steps=2, crop=64, workers=0, validate_every=2, progress=False
    )
    torch.save(gm, tmp_path / "gm.pt")
    again = torch.load(tmp_path / "gm.pt", weights_only=False)
    assert_same_loss(gradients(again, x, True), gradients(gm, x, True))
    gm.eval()
    expected = outputs(gm, x)
    assert_same(outputs(again.eval(), x), expected)
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    assert_same(outputs(fmpq_fx.load(tmp_path / "model.fmpq", model=make), x), expected)
    codec = fmpq_fx.load_codec(tmp_path / "model.fmpq", model=make, exact=False)
    assert_same(outputs(codec, x), expected)
    assert_same(outputs(fmpq_fx.convert(gm, exact=False), x), expected)


@each_kind
def test_a_graph_changes_its_type_as_the_model_does(make: Make) -> None:
    model, x = make().eval(), images(2, 32, 56).double()
    gm = traced(make)
    assert_same(outputs(gm.double(), x), outputs(model.double(), x))


def test_a_size_that_the_graph_was_not_traced_for_is_told_apart() -> None:
    gm = traced(CODECS["WindowAttention"])
    with pytest.raises(
        FmpqError, match=r"attention\.py:\d+: if down > 0 or right > 0:(.|\n)*gave True.*gives False"
    ):
        gm(images(1, 48, 48))


def test_a_mask_that_an_earlier_run_kept_is_made_anew() -> None:
    model = CODECS["WindowAttention"]().eval()
    outputs(model, images(1, 40, 56))
    gm = trace(model, images(1, 40, 56))
    for height in range(40, 137, 16):  # at one of these sizes the recorder has run the model, too
        for width in range(56, 201, 32):
            if height % 12 and width % 12:
                x = images(1, height, width)
                assert_same(outputs(gm, x), outputs(copy.deepcopy(model), x))
