"""Short training runs on smooth random images, for the tests of fine-tuning."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx import History, finetune
from fmpq_fx.rd import rate_and_distortion
from fmpq_fx.training.run import TrainingRun

LMBDA = 0.01


def photos(count: int, side: int = 96) -> list[Tensor]:
    """Return smooth random images, (3, side, side)."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return list(nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1))


def tuned(gm: fx.GraphModule, **options: Any) -> History:
    given = {"steps": 12, "crop": 64, "validate_every": 4, "workers": 0, "lr": 1e-3, **options}
    return finetune(gm, given.pop("images", photos(6)), **given)


def loss_of(gm: fx.GraphModule, images: list[Tensor], lmbda: float = LMBDA) -> float:
    """Return the RD loss in evaluation mode, by the plainest of means."""
    x = torch.stack(images)
    with torch.no_grad():
        return float(sum(rate_and_distortion(copy.deepcopy(gm).eval()(x), x, lmbda)))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def stopping_at(step: int, error: type[BaseException]) -> Callable[[TrainingRun, Tensor], dict[str, str]]:
    """Return a TrainingRun.step that raises ``error`` at ``step``, after it has changed the weights."""
    original = TrainingRun.step

    def stop(self: TrainingRun, x: Tensor) -> dict[str, str]:
        figures = original(self, x)
        if len(self.losses) == step:
            raise error
        return figures

    return stop
