"""Inputs of 16 bits: found where they pay, with few runs where there are many sites."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx.passes.clip.wide import find_wide
from fmpq_fx.passes.measure import groups
from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.quant import QuantizedLayer, quantized_layers
from support.calls import counted_calls


class Chain(nn.Module):
    """A codec of layers that change nothing; the inputs of some span so much that 8 bits are few."""

    def __init__(self, count: int, spoilt: Mapping[int, float]):
        super().__init__()
        layers = [nn.Conv2d(3, 3, 1, bias=False) for _ in range(count)]
        for layer in layers:
            nn.init.dirac_(layer.weight)
        self.layers, self.spoilt = nn.ModuleList(layers), spoilt

    def forward(self, x: Tensor) -> dict[str, Any]:
        rows = torch.ones_like(x[:1, :1, :, :1])
        rows[:, :, 2:] = 0.0
        for number, layer in enumerate(self.layers):
            factors = 1 + rows * (self.spoilt.get(number, 1.0) - 1)
            x = layer(x * factors) / factors
        return {"x_hat": x, "likelihoods": {"y": torch.full_like(x, 0.5)}}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def to_16_bits(layer: nn.Module) -> nn.Module:
    wide = copy.deepcopy(layer)
    assert isinstance(wide, QuantizedLayer)
    assert wide.input_quantizer is not None
    wide.input_quantizer.set_bits(16)
    wide.input_quantizer.freeze(0, 300.0, False)
    return wide


@pytest.mark.parametrize("spoilt", [{0: 50.0}, {6: 50.0}, {1: 50.0, 7: 41.0}])
@pytest.mark.parametrize("most", [1, 3, 32])
def test_what_pays_is_found_in_groups_of_any_size(
    images: Tensor, most: int, spoilt: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MOST", most)
    # Of eight layers alike, a quarter more products are two inputs of 16 bits.
    gm = fmpq_fx.prepare(
        Chain(8, spoilt),
        0.25,
        calibration=list(images.split(1)),
        bits=[8],
        planner="uniform",
        lmbda=10,
        activation_budget=0.25,
    )
    wide = {site for site, bits in fmpq_fx.plan_of(gm).activation_bits.items() if bits == 16}
    assert wide >= {f"layers.{number}" for number in spoilt}
    assert len(wide) <= 2


def test_a_site_that_pays_alone_is_found_among_many_in_few_runs(images: Tensor) -> None:
    gm = fmpq_fx.prepare(
        Chain(128, {77: 300.0}),
        0.25,
        calibration=images,
        bits=[8],
        planner="uniform",
        lmbda=10,
        activation_bits=8,
    )
    layers = quantized_layers(gm)
    bench = make_bench(gm, [images])
    with counted_calls(layers["layers.127"]) as runs:
        wide = find_wide(gm, bench, dict.fromkeys(layers, to_16_bits), dict.fromkeys(layers, 9.0), 9.0)
    assert wide == ["layers.77"]
    assert len(runs) <= 1 + 32 + 8, "as it is, groups of four, and a few halves"
