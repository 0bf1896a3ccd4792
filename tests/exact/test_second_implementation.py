"""Bitstreams against a second implementation, in NumPy; models whose sums are largest, or mostly ties."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmpq_fx.exact import ExactLayer
from support.coded_models import CODED, codec, extreme, latents, lively
from support.numpy_codec import in_numpy

each_coded = pytest.mark.parametrize("name", CODED)


def strings(codec: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return codec.compress(x)


@each_coded
def test_integers_of_numpy_decode_the_same_latents(name: str) -> None:
    x = lively(name)[1][:1, :, :64, : 64 if name.startswith("elic") else 128]
    coded = strings(codec(name), x)
    assert torch.equal(latents(in_numpy(codec(name)), coded), latents(codec(name), coded))


@pytest.mark.parametrize("name", ["mean-scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
@pytest.mark.parametrize("kind", ["largest", "ties"])
def test_extreme_weights_decode_the_same_latents(name: str, kind: str) -> None:
    x = lively(name)[1][:1, :, :64, :64]
    exact = extreme(name, kind)
    coded = strings(exact, x)
    expected = latents(exact, coded)
    assert expected.isfinite().all()
    assert torch.equal(latents(in_numpy(exact), coded), expected)
    assert torch.equal(latents(extreme(name, kind).double(), coded), expected)


def test_extremes_are_extreme() -> None:
    largest = extreme("mean-scale hyperprior", "largest").h_s
    last = [layer for layer in largest.modules() if isinstance(layer, ExactLayer)][-1]
    assert (last.matrix.abs() == last.matrix.abs().max()).all()
    ties = extreme("mean-scale hyperprior", "ties").h_s
    rounded: list[float] = []
    for layer in ties.modules():
        if isinstance(layer, ExactLayer):
            layer.register_forward_hook(lambda module, args, out: rounded.append(_ties(module, args[0])))
    ties(torch.randint(-20, 20, (1, 8, 4, 4)).float())
    assert max(rounded) > 0.2, "of a layer's outputs, that many lie half way between two fixed-point numbers"


def _ties(layer: nn.Module, x: Tensor) -> float:
    assert isinstance(layer, ExactLayer)
    rescaling, sums = layer.rescaling, layer.sums(layer.input_integers(x)).double()
    before = (sums * rescaling.multiplier + rescaling.offset) * rescaling.unit  # half a unit is in the offset
    return (before == before.floor()).double().mean().item()
