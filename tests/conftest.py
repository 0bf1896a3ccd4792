"""Fixtures of many tests.

The process that deals tests out to others reads this file, too: the libraries, which take seconds, are not for it.
"""

import copy
import gc
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Let torch compute in one: results do not depend on it, and two test runs side by side are not slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def seldom_collected(one_thread: None) -> None:
    """Let the garbage collector pass over what the libraries hold, and come seldom: it took a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(params=["bmshj2018-hyperprior", "mbt2018-mean", "mbt2018"])
def model_name(request: pytest.FixtureRequest) -> str:
    """Each of the three kinds of hyperprior in turn: scale, mean and scale, autoregressive."""
    name: str = request.param
    return name


@pytest.fixture
def model(model_name: str) -> "nn.Module":
    from support.small_models import small_model

    return small_model(model_name)


@pytest.fixture
def x() -> "Tensor":
    from support.small_models import images

    return images()


@pytest.fixture(scope="session")
def prepared() -> "fx.GraphModule":
    """Return a small graph at 4 bits, planned with the lambda of the fine-tuning tests; not to be changed."""
    from fmpq_fx import prepare
    from support.finetuning import LMBDA, photos
    from support.small_models import small_model

    return prepare(small_model("bmshj2018-hyperprior"), 0.125, calibration=photos(2, side=64), lmbda=LMBDA)


@pytest.fixture
def gm(prepared: "fx.GraphModule") -> "fx.GraphModule":
    """Return a copy of the small graph, to train."""
    return copy.deepcopy(prepared)
