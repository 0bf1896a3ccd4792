"""A codec's fingerprint covers what is computed: the same in float32 and float64, another one after any change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fmpq_fx import FmpqError, decode, encode
from fmpq_fx.coding.codec_fingerprint import fingerprint_of
from fmpq_fx.storage import fingerprint
from support.coded_models import codec, lively


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018"])
def test_float32_and_float64_decode_each_others_files(name: str) -> None:
    single, image = codec(name), lively(name)[1][0, :, :64, :64].clamp(0, 1)
    double = copy.deepcopy(single).double()
    assert fingerprint_of(single) == fingerprint.of_codec(single), "that of files that are there already"
    for encoder in (single, double):
        data = encode(encoder, image)
        assert (decode(single, data) - decode(double, data)).abs().max() < 1e-3


def test_half_precision_computes_with_other_numbers_and_says_so() -> None:
    exact = codec("scale hyperprior")
    data = encode(exact, torch.rand(3, 64, 64))
    with pytest.raises(FmpqError, match="in float32: in bfloat16 a codec computes with other numbers"):
        decode(copy.deepcopy(exact).bfloat16(), data)


def in_place(codec: Any) -> None:
    with torch.no_grad():
        codec.g_a[0].layer.bias[0] += 1


def through_data(codec: Any) -> None:
    codec.g_a[0].layer.bias.data[0] += 1


def loaded(codec: Any) -> None:
    state = {name: value.clone() for name, value in codec.state_dict().items()}
    state["g_a.0.layer.bias"][0] += 1
    codec.load_state_dict(state)


def exchanged(codec: Any) -> None:
    codec.g_a[0].layer.bias = torch.nn.Parameter(codec.g_a[0].layer.bias + 1)


@pytest.mark.parametrize(
    "change", [in_place, through_data, loaded, exchanged, lambda codec: codec.bfloat16()]
)
def test_any_change_changes_it(change: Callable[[Any], None]) -> None:
    changed = copy.deepcopy(codec("scale hyperprior"))
    before = fingerprint_of(changed)
    assert fingerprint_of(changed) == before
    change(changed)
    assert fingerprint_of(changed) == fingerprint.of_codec(changed) != before
