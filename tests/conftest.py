"""Shared by all tests: small models that are quick to measure, and where the photographs and checkpoints lie."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
import torch
from compressai.models import JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior, ScaleHyperprior
from torch import Tensor, fx, nn

from fmpq_fx import prepare
from support.finetuning import LMBDA, photos

matplotlib.use("Agg")
torch.set_num_threads(1)  # results do not depend on it, and two test runs side by side are not slower

SHARED = Path(os.environ.get("FMPQ_FX_SHARED", Path(__file__).resolve().parents[2] / "shared"))

SMALL: dict[str, Callable[[], nn.Module]] = {
    "bmshj2018-hyperprior": lambda: ScaleHyperprior(8, 12),
    "mbt2018-mean": lambda: MeanScaleHyperprior(8, 12),
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(12, 12),
}


def small_model(name: str) -> nn.Module:
    """Return a small model with random weights that are large enough for its latents not to be all zero."""
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    with torch.no_grad():
        for module_name in ("g_a.6", "h_a.4"):
            model.get_parameter(f"{module_name}.weight").mul_(20)
    return model


@pytest.fixture(params=SMALL)
def model_name(request: pytest.FixtureRequest) -> str:
    """Each of the three kinds of hyperprior in turn: scale, mean and scale, autoregressive."""
    name: str = request.param
    return name


@pytest.fixture
def model(model_name: str) -> nn.Module:
    return small_model(model_name)


def images() -> Tensor:
    """Return two smooth random images, (2, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)


@pytest.fixture
def x() -> Tensor:
    return images()


def shared(*parts: str) -> Path:
    """Return a path among the development data, or skip the test where there is none."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the development data, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def prepared() -> fx.GraphModule:
    """Return a small graph at 4 bits, planned with the lambda of the fine-tuning tests; not to be changed."""
    return prepare(small_model("bmshj2018-hyperprior"), 0.125, calibration=photos(2, side=64), lmbda=LMBDA)


@pytest.fixture
def gm(prepared: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the small graph, to train."""
    return copy.deepcopy(prepared)
