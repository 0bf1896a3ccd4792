"""The options of training: what they are by default, and which are refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, Measured
from fmpq_fx.history import Settings
from fmpq_fx.training.finetuning import learning_rate
from support.finetuning import LMBDA, photos, tuned


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"loss": "ssim"}, "loss must be one of rd, mse, got 'ssim'"),
        ({"crop": 100}, "crop must be a positive multiple of 64, got 100"),
        ({"lmbda": 0.0}, "lmbda must be positive"),
        ({"seed": -1}, "seed must not be negative"),
        ({"size_weight": -0.5}, "size_weight must be 0 or positive, and finite, got -0.5"),
        ({"size_weight": float("nan")}, "size_weight must be 0 or positive, and finite, got nan"),
        ({"size_weight": float("inf")}, "size_weight must be 0 or positive, and finite, got inf"),
        (
            {"size_weight": 1.0, "loss": "mse"},
            "size_weight 1 weighs the size against the RD loss.*pass loss='rd'",
        ),
        ({"images": []}, "the sequence is empty"),
    ],
)
def test_arguments_out_of_range(gm: fx.GraphModule, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tuned(gm, **options)


def test_a_misspelt_option_is_told_what_there_is(gm: fx.GraphModule) -> None:
    with pytest.raises(TypeError, match=r"no option 'step'; its options are lmbda, steps, distortion, loss"):
        tuned(gm, step=2)


def test_unusable_images(gm: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(FmpqError, match="no images in"):
        tuned(gm, images=tmp_path)
    with pytest.raises(FmpqError, match="only 1 usable image"):
        tuned(gm, images=photos(1))
    with pytest.raises(FmpqError, match=r"none of the 3 images can be used for crops of 128 x 128"):
        tuned(gm, images=photos(3), crop=128)
    with pytest.raises(TypeError, match="expected an image folder, or a list"):
        tuned(gm, images=photos(1)[0])


def test_a_graph_that_was_not_prepared() -> None:
    graph = fx.symbolic_trace(nn.Identity())
    with pytest.raises(FmpqError, match=r"carries no plan: pass what fmpq_fx.prepare"):
        tuned(graph)


def test_the_learning_rate_is_constant_then_half_a_cosine() -> None:
    plain, late = Settings(LMBDA, steps=100), Settings(LMBDA, steps=100, constant=0.6)
    assert [plain.schedule(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert [late.schedule(step) for step in (0, 60, 80, 100)] == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_in_half_precision_is_refused(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    with pytest.raises(FmpqError, match=r"too coarse to train in: train model.float\(\)"):
        tuned(gm.to(dtype))


def test_the_learning_rate_grows_with_the_damage(gm: fx.GraphModule) -> None:
    plan = fmpq_fx.plan_of(gm)
    rates = [
        learning_rate(dataclasses.replace(plan, measured=Measured(1.0, 1 + damage / 2, 1 + damage)))
        for damage in (-0.1, 0.001, 0.1, 0.2, 5.0)
    ]
    assert rates == pytest.approx([3e-5, 3e-5, 1e-4, 1e-4 * 2**0.5, 2e-4])
    float_inputs = dict.fromkeys(plan.bits)
    weights_only = dataclasses.replace(plan, activation_bits=float_inputs, measured=Measured(1.0, 1.1, 9.0))
    assert learning_rate(weights_only) == pytest.approx(1e-4)
    assert learning_rate(dataclasses.replace(plan, measured=None)) == 1e-4
    assert tuned(gm, lr=None).settings.lr == learning_rate(plan)
