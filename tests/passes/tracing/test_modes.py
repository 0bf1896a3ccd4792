"""What a forward does in training is recorded where it may be something else, in whatever way it knows of the mode."""

import copy
from typing import Any

import pytest
import torch
from compressai.latent_codecs import LatentCodec
from torch import Tensor, nn

from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.module import TracedModule
from support.codecs.rounding import NoiseInTraining
from support.codecs.small import Small
from support.traced_models import assert_same

RUNS: list[str] = []


class Counted(Small):
    """Notes each run of its forward."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        RUNS.append(type(self).__name__)
        return super().forward(x)


class CountedNoise(Counted, NoiseInTraining):
    """Asks for the mode."""


class OwnTrain(Small):
    """Keeps the mode under a name of its own."""

    noisy = False

    def train(self, mode: bool = True) -> "OwnTrain":
        self.noisy = mode
        super().train(mode)
        return self

    def synthesis(self, y_hat: Tensor) -> Tensor:
        return super().synthesis(y_hat + 1 if self.noisy else y_hat)


class OwnDefault(Small):
    """Says in its class what the mode is at first."""

    training = True

    def synthesis(self, y_hat: Tensor) -> Tensor:
        return super().synthesis(y_hat + 1 if self.training else y_hat)


class ByValues(Small):
    """Decides by the values of a layer, which are others in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def synthesis(self, y_hat: Tensor) -> Tensor:
        ones = torch.ones_like(y_hat)
        return super().synthesis(y_hat + 1 if bool((self.drop(ones) != ones).any()) else y_hat)


class Shifting(LatentCodec):
    """Returns more in training."""

    def forward(self, y: Tensor) -> dict[str, Tensor]:
        return {"y_hat": y, "shifted": y + 1} if self.training else {"y_hat": y}


class ByCodec(Small):
    """Takes what a latent codec returns in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.codec = Shifting()

    def synthesis(self, y_hat: Tensor) -> Tensor:
        found = self.codec(y_hat)
        return super().synthesis(found.get("shifted", found["y_hat"]))


def test_a_forward_that_does_not_ask_for_the_mode_is_recorded_once() -> None:
    x = torch.rand(1, 3, 32, 32)
    for cls, runs in ((Counted, 1), (CountedNoise, 2)):
        RUNS.clear()
        gm = trace(cls().eval(), x)
        assert len(RUNS) == runs
        assert isinstance(gm, TracedModule)
        assert (gm.training_graph is not None) == (runs == 2)


@pytest.mark.parametrize("make", [NoiseInTraining, OwnTrain, OwnDefault, ByValues, ByCodec])
def test_the_graph_does_in_training_what_the_model_does(make: type[Small]) -> None:
    model, x = make().eval(), torch.rand(1, 3, 32, 32)
    gm = trace(model, x)
    for training in (False, True):
        found = []
        for each in (gm, copy.deepcopy(model)):
            each.train(training)
            torch.manual_seed(0)
            output = each(x.clone())
            found.append({"x_hat": output["x_hat"], **output["likelihoods"]})
        assert_same(*found)
