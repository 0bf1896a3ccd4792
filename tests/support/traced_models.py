"""Models to trace: the zoo at a small size, and one whose forward a test chooses."""

from collections.abc import Callable
from typing import Any

import compressai.models as zoo
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, nn

Make = Callable[[], nn.Module]

PLAIN: dict[str, Make] = {
    "factorized": lambda: zoo.FactorizedPrior(8, 12),
    "factorized-relu": lambda: zoo.FactorizedPriorReLU(8, 12),
    "scale hyperprior": lambda: zoo.ScaleHyperprior(8, 12),
    "mean-scale hyperprior": lambda: zoo.MeanScaleHyperprior(8, 12),
    "mbt2018": lambda: zoo.JointAutoregressiveHierarchicalPriors(8, 12),
    "cheng2020-anchor": lambda: zoo.Cheng2020Anchor(8),
    "cheng2020-attention": lambda: zoo.Cheng2020Attention(8),
}
WITH_CODEC: dict[str, Make] = {
    "elic-official": lambda: zoo.Elic2022Official(8, 16, groups=[2, 6, 8]),
    "elic-chandelier": lambda: zoo.Elic2022Chandelier(8, 16, groups=[2, 6, 8]),
    "cheng2020-checkerboard": lambda: zoo.Cheng2020AnchorCheckerboard(12),
}

each_model = pytest.mark.parametrize("make", (PLAIN | WITH_CODEC).values(), ids=PLAIN | WITH_CODEC)
each_codec = pytest.mark.parametrize("make", WITH_CODEC.values(), ids=WITH_CODEC)


def lively(make: Make) -> nn.Module:
    """Return a model whose latents are not all rounded to zero, as they are after plain initialization."""
    torch.manual_seed(0)
    model = make()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    return model.eval()


def photos(count: int = 2, size: int = 64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return all outputs of ``model``, flat; ``x`` itself is not handed to it, lest it be overwritten."""
    with torch.no_grad():
        output = model(x.clone())
    return {"x_hat": output["x_hat"], **output["likelihoods"]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Codec(nn.Module):
    """A user's own model, registered nowhere; ``analysis`` is what a test wants to see traced."""

    def __init__(self, analysis: Callable[[Any, Any], Any] = lambda m, x: m.conv(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.analysis = analysis
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.shift = nn.Parameter(torch.zeros(1))
        self.prior = EntropyBottleneck(3)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.prior(20 * self.analysis(self, x))
        return {"x_hat": self.last(y_hat), "likelihoods": {"y": likelihoods}}


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x
