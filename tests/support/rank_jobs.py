"""What the tests of several ranks run in each of them.

A failed assertion of any rank ends the job, and so fails the test that started it.
"""

import copy
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fmpq_fx import FmpqError, History, plan_of, prepare, ranks
from fmpq_fx.cli.main import main
from fmpq_fx.training.run import TrainingRun
from support.finetuning import LMBDA, photos, tuned
from support.small_models import small_model

# One thread, as conftest sets. A fork has the pool of OpenMP without its threads, and would wait for them.
torch.set_num_threads(1)

CALIBRATION = torch.stack(
    photos(5, side=64)
)  # batches of 2, 2 and 1: the ranks have different numbers of them
TRAIN = ("--steps", "4", "--crop", "64", "--validate-every", "2", "--workers", "0", "--lr", "1e-3")


def model() -> nn.Module:
    return small_model("bmshj2018-hyperprior")


def both_sizes() -> dict[str, fx.GraphModule]:
    """Return a graph planned in nominal bytes, with clipped weights and activations, and one in coded bytes."""
    return {
        "nominal": prepare(model(), 0.125, calibration=CALIBRATION, lmbda=LMBDA, bits=[3, 4, 5]),
        "coded": prepare(
            model(),
            0.2,
            calibration=CALIBRATION,
            bits=[4, 8],
            activation_bits=None,
            size="coded",
            planner="optimal",
        ),
    }


def uniform() -> fx.GraphModule:
    return prepare(model(), 0.125, calibration=CALIBRATION, planner="uniform", bits=[4], lmbda=LMBDA)


def without_noise(gm: fx.GraphModule, **options: Any) -> History:
    """Fine-tune with the noise that stands for rounding at 0, since ranks draw other noise than one process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "uniform_", lambda self, *_: self.zero_())
        return tuned(gm, steps=6, validate_every=3, batch_size=4, **options)


def share_work(folder: Path) -> None:
    """Prepare, fine-tune and go on from a checkpoint; every rank saves what it has. Then rank 1 is killed."""
    with ranks.joined() as device:
        assert (device.type, ranks.current().count) == ("cpu", 2)
        found: dict[str, Any] = {}
        for name, gm in both_sizes().items():
            found[name] = {"state": gm.state_dict(), "plan": plan_of(gm).to_json()}
        gm = uniform()
        refuse_what_differs(gm)
        runs: dict[str, dict[str, Any]] = {
            "tuned": {},
            "resumed": {"checkpoint": folder / "training.pt", "loss": "mse"},
            "bfloat16": {"bfloat16": True},
            "size": {"size_weight": 1.0},
        }
        for name, options in runs.items():
            trained = copy.deepcopy(gm)
            history = without_noise(trained, **options)
            found[name] = {"state": trained.state_dict(), "history": history.to_json()}
        torch.save(found, folder / f"rank{ranks.current().rank}.pt")
        if (
            ranks.current().gather(True) and ranks.current().rank == 1
        ):  # as by the kernel when memory is short
            os.kill(os.getpid(), signal.SIGKILL)
        without_noise(gm)


def refuse_what_differs(gm: fx.GraphModule) -> None:
    more = 2 * ranks.current().rank
    with pytest.raises(
        FmpqError, match=r"different things: the calibration is '5 crops .*for rank 1; start all"
    ):
        prepare(model(), 0.125, calibration=torch.stack(photos(5 + more, side=64)))
    with pytest.raises(FmpqError, match=r"different things: images is .*for rank 0 and .*for rank 1"):
        tuned(gm, images=photos(6 + more))
    other = model()
    with torch.no_grad():
        other.get_parameter("g_a.0.weight").mul_(1 + more)
    with pytest.raises(FmpqError, match=r"different things: the model is 'ScaleHyperprior, weights"):
        prepare(other, 0.125, calibration=CALIBRATION)
    with pytest.raises(
        ValueError, match="batch_size counts the crops of all ranks: 3 cannot be shared evenly by 2"
    ):
        tuned(gm, batch_size=3)


def command_line(folder: Path) -> None:
    """Prepare and fine-tune as a user does; then rank 1 fails in the midst of fine-tuning."""
    state, images = str(folder / "state"), str(folder / "photos")
    given = ("--target-cr", "8", "--images", images, "--bits", "3-5", "--out", state)
    assert main(["prepare", "support.rank_jobs:model", *given]) == 0
    assert main(["finetune", state, images, "--out", str(folder / "tuned"), *TRAIN]) == 0
    assert main(["evaluate", state, images]) == 2

    step = TrainingRun.step

    def failing(self: TrainingRun, x: Tensor) -> dict[str, str]:
        if ranks.current().rank == 1 and len(self.losses) == 2:
            raise FmpqError("its disk is full")
        return step(self, x)

    TrainingRun.step = failing  # type: ignore[method-assign]
    sys.exit(main(["finetune", state, images, "--out", str(folder / "x"), *TRAIN]))
