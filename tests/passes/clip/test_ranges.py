"""How inputs are rounded: steps per channel, ranges and bits."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compressai.layers import GDN
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx.passes.clip.ranges import calibrate
from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.passes.plan.activations import wide_inputs
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace


class Uneven(nn.Module):
    """A codec without a rate whose two channels reach a convolution in very different ranges."""

    def __init__(self, factor: float):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1, bias=False)
        self.last = nn.Conv2d(4, 3, 1, bias=False)
        sizes = torch.tensor([factor, 0.7, 0.8, 0.9])
        with torch.no_grad():  # last undoes first, and channel 0 carries next to nothing
            self.first.weight.copy_((sizes[:, None] * torch.eye(4, 3).roll(1, 0))[..., None, None])
            self.first.weight[0, 0] = factor
            self.last.weight.copy_((torch.eye(3, 4).roll(1, 1) / sizes)[..., None, None])
            self.last.weight[:, 0] = 1e-3 / factor

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.first(x)
        return {"x_hat": self.last(y), "likelihoods": {"y": torch.full_like(y, 0.5)}}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return fmpq_fx.prepare(model, 0.25, calibration=x, bits=[8], planner="uniform", lmbda=10, **options)


def rd(gm: Any) -> float:
    measured = fmpq_fx.plan_of(gm).measured
    assert measured is not None
    return measured.rd / measured.weights_rd - 1


def test_channels_of_small_range_get_steps_of_their_own(images: Tensor) -> None:
    even, uneven = (prepared(Uneven(factor), images, activation_bits=4) for factor in (1.0, 30.0))
    spread = fmpq_fx.plan_of(uneven).inputs["last"].spread
    assert spread[0] == 0
    assert min(spread[1:]) >= 8 * 0.5 * np.log2(30) - 1, "half the octaves between the ranges, at least"
    assert rd(uneven) < 3 * rd(even), "with one step for all channels it is a hundred times as much"
    with torch.no_grad():
        error = (uneven(images)["x_hat"] - images).square().mean()
        one_step = (torch.round(images / 2) * 2 - images).square().mean()  # 30 in 15 steps
    assert error < one_step / 10


def test_channels_without_a_range_are_no_obstacle(images: Tensor) -> None:
    model = Uneven(30.0)
    with torch.no_grad():
        model.first.weight[1] = 0
    gm = prepared(model, images, activation_bits=4)
    spread = fmpq_fx.plan_of(gm).inputs["last"].spread
    assert spread[1] == 0, "of a channel that was always zero nothing is known; it gets the widest step"
    assert all(torch.isfinite(p).all() for p in gm.parameters())


def test_sixteen_bits_go_where_they_pay_within_the_budget(images: Tensor) -> None:
    gm = prepared(Uneven(1.0), images, activation_budget=0.5)
    plan = fmpq_fx.plan_of(gm)
    assert plan.macs == {"first": 12.0, "last": 12.0}, "3 * 4 per pixel"
    assert sorted(plan.activation_bits.values(), key=str) == [16, 8], (
        "two products of one, and one of the other"
    )
    assert plan.products() == 36 == 1.5 * plan.products(8)
    assert rd(gm) < rd(prepared(Uneven(1.0), images, activation_bits=8))
    for budget in (0.0, 0.49):
        none = fmpq_fx.plan_of(prepared(Uneven(1.0), images, activation_budget=budget))
        assert set(none.activation_bits.values()) == {8}
    for budget in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="activation_budget is"):
            prepared(Uneven(1.0), images, activation_budget=budget)


def test_widths_of_single_sites_are_kept(images: Tensor) -> None:
    gm = prepared(Uneven(1.0), images, activation_bits={"first": 6}, activation_budget=1.0)
    plan = fmpq_fx.plan_of(gm)
    assert plan.activation_bits == {"first": 6, "last": 16}
    again = fmpq_fx.rewrite(Uneven(1.0), fmpq_fx.Plan.from_json(plan.to_json()))
    with torch.no_grad():
        assert torch.equal(again(images)["x_hat"], gm(images)["x_hat"])
    all_float = prepared(Uneven(1.0), images, activation_bits={"*": None})
    assert fmpq_fx.plan_of(all_float).rounded_inputs == []


class Mixture(nn.Module):
    """A layer of each kind, with strides, groups and few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 5, 2, 2)
        self.grouped = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.gdn = GDN(8)
        self.mixed = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 3, 5, 2, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.gdn(self.grouped(self.down(x)))
        y = self.mixed(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {"x_hat": self.up(input=y), "likelihoods": {"y": torch.sigmoid(y)}}


@pytest.mark.parametrize(("target", "fixed"), [(0.2, None), (0.55, {"up": None, "gdn": None})])
def test_multiply_accumulates_of_all_layers_are_counted(
    images: Tensor, target: float, fixed: dict[str, None] | None
) -> None:
    gm = fmpq_fx.prepare(Mixture(), target, calibration=images, bits=[4, 8], fixed=fixed, activation_bits=8)
    plan = fmpq_fx.plan_of(gm)
    of_place = {"down": 3 * 8 * 25, "grouped": 4 * 8 * 9, "gdn": 8 * 8, "mixed": 8 * 8, "up": 8 * 3 * 25}
    assert plan.macs == {name: count / 4 for name, count in of_place.items()}


@pytest.mark.parametrize("seed", range(20))
def test_the_inputs_of_sixteen_bits_are_the_best_that_fit(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(8)]
    zeta = dict(zip(names, random.normal(1e-3, 1e-3, 8).tolist(), strict=True))
    products = dict(zip(names, random.integers(1, 100, 8).astype(float).tolist(), strict=True))
    budget = float(random.integers(0, 250))
    subsets = (set(s) for n in range(9) for s in itertools.combinations(names, n))
    best = max(
        sum(zeta[s] for s in subset) for subset in subsets if sum(products[s] for s in subset) <= budget
    )
    chosen = wide_inputs(zeta, products, budget)
    assert sum(products[s] for s in chosen) <= budget
    assert sum(zeta[s] for s in chosen) == pytest.approx(best, abs=1e-12)


def test_images_keep_the_grid_of_their_files(images: Tensor) -> None:
    photograph = (200 * images).round() / 255  # without any white
    gm = prepared(Uneven(1.0), photograph, activation_bits=8)
    grid = fmpq_fx.plan_of(gm).inputs["first"]
    assert (grid.low, grid.high, grid.spread) == (0, 1, ())
    white = 1 - photograph
    with torch.no_grad():
        assert (gm.get_submodule("first").quantized_input(white) - white).abs().max() < 1e-6


class Shared(nn.Module):
    """Calls one layer on the images, and on what is larger than any image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(3)[..., None, None])

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(8 * self.layer(x))
        return {"x_hat": y, "likelihoods": {"y": torch.full_like(y, 0.5)}}


def test_a_layer_that_takes_more_than_images_is_not_clipped_to_theirs(images: Tensor) -> None:
    gm = prepared(Shared(), images, activation_bits=8)
    with torch.no_grad():
        assert (gm(images)["x_hat"] - 8 * images).abs().max() < 0.5, "one layer has one step, of 8 / 255"


def test_ranges_cover_what_further_images_hold(images: Tensor) -> None:
    model = Uneven(1.0)
    plan = fmpq_fx.plan_of(prepared(model, images / 10, activation_bits=None))
    grids = []
    for watched in ([], [images]):
        gm = trace(model)
        find_sites(gm)
        gm = quantize(gm, replace(plan, activation_bits={"first": 8, "last": 8}))
        calibrate(gm, make_bench(gm, [images / 10]), watched=watched)
        grids.append(fmpq_fx.plan_of(gm).inputs["last"])
    narrow, wide = grids
    assert wide.high == pytest.approx(10 * narrow.high, rel=0.2)
