"""The examples' own code, on less than they use: a user starts from it."""

import sys
from pathlib import Path

import torch
from torch import Tensor

import fmpq_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from custom_model import TinyCodec


def test_a_model_of_ones_own_needs_no_registration(x: Tensor) -> None:
    torch.manual_seed(0)
    model = TinyCodec(channels=8, latents=12).eval()
    gm = fmpq_fx.prepare(model, 6, calibration=x, fixed={"synthesis.3": 8})
    plan = fmpq_fx.plan_of(gm)
    kinds = {site.name: site.kind for site in plan.sites}
    assert kinds["analysis.2.branch"] == "Conv2d"
    assert kinds["analysis.2.weigh"] == "Linear"
    assert kinds["analysis.1"] == "GDN"
    assert plan.bits["synthesis.3"] == 8
    assert 1 / 6 - 0.01 <= plan.cr <= 1 / 6
