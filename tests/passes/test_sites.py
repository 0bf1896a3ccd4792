"""Sites: what is none of them is told, by name and reason."""

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx.passes.sites import find_sites, left_out
from fmpq_fx.passes.trace import trace
from support.traced_models import Codec, photos


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def analysis(m: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, m.conv.weight, padding=1)
    places = m.own(x).flatten(2).transpose(1, 2)
    mixed, _ = m.attention(places, places, places)
    return mixed.transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


def test_layers_that_are_no_sites_are_told_with_the_reason() -> None:
    model: Any = Codec(analysis)
    model.own, model.unused = Doubled(3, 3, 1), nn.Linear(2, 2)
    model.attention = nn.MultiheadAttention(3, 1, batch_first=True)
    gm = trace(model, photos(1, 16))
    sites = find_sites(gm)
    assert [site.name for site in sites] == ["last"]
    assert left_out(gm, sites) == {
        "conv": "its weight is read without a call of the layer",
        "own": "the forward of Doubled is its own",
        "unused": "it does not run in evaluation",
        "attention.out_proj": "it is a part of torch's MultiheadAttention",
    }


def test_the_plan_and_the_table_tell_what_is_left_out() -> None:
    torch.manual_seed(0)
    model = Codec(lambda m, x: F.conv2d(x, m.conv.weight, padding=1))
    gm = fmpq_fx.prepare(model, 0.25, calibration=photos(1, 16), planner="uniform", progress=False)
    plan = fmpq_fx.plan_of(gm)
    assert plan.left_out == {"conv": "its weight is read without a call of the layer"}
    assert "conv: its weight is read without a call of the layer" in " ".join(fmpq_fx.bit_table(gm).split())
    fields = json.loads(plan.to_json())
    assert fmpq_fx.Plan.from_json(json.dumps(fields)) == plan
    for name in ("left_out", "example"):  # which older plans do not have
        fields.pop(name)
    older = fmpq_fx.Plan.from_json(json.dumps(fields))
    assert (older.left_out, older.example) == ({}, None)
