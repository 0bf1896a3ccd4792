"""Layers inside latent codecs, and those that are called by several names, are replaced wherever they are called."""

import copy
from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.latent_codecs import LatentCodec
from torch import Tensor, nn

from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.clip.ranges import calibrate
from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import QuantizedLayer, quantized_layers
from support.rewritten import notes, outputs, plan_for, same
from support.traced_models import WITH_CODEC, lively


@pytest.mark.parametrize("name", ["elic-official", "cheng2020-checkerboard"])
def test_sites_inside_an_opaque_codec_are_really_replaced(name: str, x: Tensor) -> None:
    model = lively(WITH_CODEC[name])
    float_gm = trace(model)
    names = [site.name.replace(".", "__") for site in find_sites(float_gm)]
    before = outputs(model, x)
    for site in ("latent_codec__hyper__h_a__0", "latent_codec__hyper__h_s__0", names[-1]):
        gm = copy.deepcopy(float_gm)
        rewritten = quantize(gm, plan_for(gm, 8, **{**dict.fromkeys(names), site: 2}))
        assert list(quantized_layers(rewritten)) == [site.replace("__", ".")]
        assert not same(outputs(rewritten, x), before), site
    calibrate(rewritten, make_bench(rewritten, [x]))
    twin = copy.deepcopy(rewritten)
    assert same(outputs(twin, x), outputs(rewritten, x))
    note = dict(notes(twin))["latent_codec"]
    assert note.bits == {site: plan_of(twin).bits[site] for site in note.sites}


class Shared(nn.Module):
    """A user's model that calls a layer by two names, and perhaps again inside a latent codec."""

    def __init__(self, inside: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first = self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.codec = _Codec(self.first if inside else nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        out = self.codec(self.second(self.first(x)))
        return {"x_hat": out["y_hat"], "likelihoods": out["likelihoods"]}


class _Codec(LatentCodec):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = self.alias = layer  # CompressAI's codecs have such aliases
        self.prior = EntropyBottleneck(3)

    def forward(self, y: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.prior(50 * self.alias(y))
        return {"y_hat": y_hat, "likelihoods": {"y": likelihoods}}


@pytest.mark.parametrize("inside", [False, True])
def test_a_shared_layer_is_replaced_once_everywhere(inside: bool, x: Tensor) -> None:
    gm = trace(Shared(inside).eval())
    plan = plan_for(gm)
    assert len(plan.sites) == (1 if inside else 2)
    rewritten = quantize(gm, plan)
    found = rewritten.named_modules(remove_duplicate=False)
    floats = [name for name, m in found if type(m) is nn.Conv2d]
    assert all(
        isinstance(rewritten.get_submodule(name.rpartition(".")[0]), QuantizedLayer) for name in floats
    )
    outputs(rewritten, x)
