"""Settings of sites are chosen by the RD loss, and by no more runs of the graph than that takes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import fmpq_fx
from fmpq_fx import plan_of, samples
from fmpq_fx.images import crops
from fmpq_fx.passes.clip.descent import choose
from fmpq_fx.passes.measure import groups
from fmpq_fx.passes.measure.bench import Bench, make_bench, mean_rd
from fmpq_fx.quant import QuantizedLayer, quantized_layers
from support.calls import counted_calls

LMBDA = 0.013
PIECES = 4


@pytest.fixture(scope="module")
def images() -> Tensor:
    return crops.cut(list(samples.photos().values()), size=64, count=PIECES)[0]


@pytest.fixture(scope="module")
def quantized(images: Tensor) -> fx.GraphModule:
    """Quantize a model to 4 bits in which half of the range of the last layer is for weights that do nothing."""
    model = samples.model()
    with torch.no_grad():
        model.get_parameter("g_s.4.weight")[:, 0] = (
            0  # (in, out, 5, 5): so the last layer's first input is zero
        )
        model.get_parameter("g_s.4.bias")[0] = 0
        weight = model.get_parameter("g_s.6.weight")
        weight[0] = 3 * weight.abs().amax()
    gm = fmpq_fx.prepare(
        model, 4 / 32, calibration=images, bits=[4], planner="uniform", lmbda=LMBDA, activation_bits=None
    )
    assert plan_of(gm).clips["g_s.6"] < 1
    for layer in quantized_layers(gm).values():
        layer.set_clip(1.0)
    return gm


@pytest.fixture
def gm(quantized: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(quantized)


@pytest.fixture
def four_pieces(gm: fx.GraphModule, images: Tensor) -> Bench:
    return make_bench(gm, images.split(1))


def setters_of(gm: fx.GraphModule) -> dict[str, Callable[[float], None]]:
    return {site: layer.set_clip for site, layer in quantized_layers(gm).items()}


def test_a_site_with_something_to_gain_is_changed(gm: fx.GraphModule, four_pieces: Bench) -> None:
    before = mean_rd(gm, four_pieces, LMBDA)
    chosen, rd = choose(gm, four_pieces, LMBDA, setters_of(gm), (1.0, 0.5), "clips")
    assert chosen["g_s.6"] == 0.5, "half of the range holds all weights that matter"
    assert rd < before
    assert rd == pytest.approx(mean_rd(gm, four_pieces, LMBDA), rel=1e-12)


def test_a_site_with_nothing_to_gain_costs_no_runs(gm: fx.GraphModule, four_pieces: Bench) -> None:
    layers = quantized_layers(gm)
    with counted_calls(layers["g_s.6"]) as calls:
        chosen, rd = choose(gm, four_pieces, LMBDA, setters_of(gm), (1.0, 0.01), "clips")
    assert set(chosen.values()) == {1.0}
    assert len(calls) == 1 + PIECES, "one run for the errors of outputs, and the RD loss of each piece"
    assert rd == pytest.approx(mean_rd(gm, four_pieces, LMBDA), rel=1e-12)


def test_what_is_evidently_worse_is_run_on_the_first_images_alone(
    gm: fx.GraphModule, four_pieces: Bench
) -> None:
    # By the error of its output the site would rather be clipped; what comes with it makes the image far worse.
    layers = quantized_layers(gm)

    def clip_both(clip: float) -> None:
        layers["g_s.4"].set_clip(clip)
        layers["g_s.6"].set_clip(1.0 if clip == 1 else 0.05)

    with counted_calls(layers["g_s.6"]) as calls:
        chosen, _ = choose(gm, four_pieces, LMBDA, {"g_s.4": clip_both}, (1.0, 0.9), "clips")
    assert chosen == {"g_s.4": 1.0}
    assert len(calls) == 1 + PIECES + 1


@pytest.mark.parametrize("most", [1, 3])
def test_many_sites_are_settled_in_groups(
    gm: fx.GraphModule, four_pieces: Bench, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    before = mean_rd(gm, four_pieces, LMBDA)
    monkeypatch.setattr(groups, "MOST", most)
    chosen, rd = choose(gm, four_pieces, LMBDA, setters_of(gm), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), "clips")
    assert chosen["g_s.6"] < 1
    assert rd < before
    assert rd == pytest.approx(mean_rd(gm, four_pieces, LMBDA), rel=1e-12)
    for site, layer in quantized_layers(gm).items():
        kept = layer.weight_quantizer.log_scale.clone()
        layer.set_clip(chosen[site])
        assert torch.equal(kept, layer.weight_quantizer.log_scale)


def test_a_group_that_gains_together_takes_one_verdict(
    gm: fx.GraphModule, four_pieces: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MOST", 1)
    sites: dict[str, QuantizedLayer] = {name: quantized_layers(gm)[name] for name in ("g_s.4", "g_s.6")}
    with counted_calls(sites["g_s.6"]) as calls:
        chosen, _ = choose(
            gm,
            four_pieces,
            LMBDA,
            {site: layer.set_clip for site, layer in sites.items()},
            (1.0, 0.5),
            "clips",
        )
    assert chosen["g_s.6"] == 0.5
    assert len(calls) <= 1 + PIECES + PIECES
