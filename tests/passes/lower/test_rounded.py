"""Latents that a forward rounds by itself: exact where they are rounded as they are coded, and refused where not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressai.models import MeanScaleHyperprior
from compressai.ops import quantize_ste
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.passes.lower.entropy_path import entropy_path
from support.codecs import slices
from support.coded_models import graph_of
from support.small_models import images


def ste_round(x: Tensor) -> Tensor:
    return torch.round(x) - x.detach() + x


@pytest.mark.parametrize(
    "rounded",
    [
        quantize_ste,
        ste_round,
        torch.round,
        lambda x: x.round().detach(),
        lambda x: torch.clone(input=torch.round(x)),
    ],
)
def test_latents_that_a_forward_rounds_by_itself(
    rounded: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "quantize_ste", rounded)
    model = slices.Slices().eval()
    with torch.no_grad():
        model.entropy_bottleneck.quantiles[:, 0, 1] = 0.3
        for layer in (*model.means, *model.scales):
            layer.weight.mul_(20)
    gm = graph_of(model, images())
    path = entropy_path(gm)
    assert path.priors == ("entropy_bottleneck",)
    assert {"means.0", "scales.2", "h_s.0", "h_s.1"} < set(path.layers)
    codec: Any = fmpq_fx.convert(gm, exact="require")
    with torch.no_grad():
        coded = codec.compress(images()[:1])
        found = codec.latents(**coded)
        assert torch.equal(copy.deepcopy(codec).double().latents(**coded), found.double())
        assert torch.equal(found * 4096, (found * 4096).round())
        assert found.round().unique().numel() > 4
        assert torch.equal(codec.synthesis(found), codec(images()[:1])["x_hat"])


class RoundedOtherwise(MeanScaleHyperprior):
    """Rounds latents that its entropy model codes in another way, and reads them for the next ones."""

    def __init__(self, rounded: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(8, 12)
        self.rounded, self.more = rounded, nn.Conv2d(12, 24, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x)
        z_hat, z = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        _, first = self.gaussian_conditional(y, scales, means=means)
        y_hat = self.rounded(y, means)
        scales, means = self.more(y_hat).chunk(2, 1)
        _, second = self.gaussian_conditional(y, scales, means=means)
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"first": first, "second": second, "z": z}}


@pytest.mark.parametrize(
    "rounded",
    [
        lambda y, means: torch.round(y - means) + means.abs(),
        lambda y, means: torch.round(y + means) + means,
        lambda y, means: torch.round(2 * y - means) + means,
        lambda y, means: torch.round(y - means, decimals=1) + means,
        lambda y, means: torch.floor(y - means) + means,
        lambda y, means: torch.round(y - means) - (y - means) + y,
    ],
)
def test_latents_that_are_rounded_otherwise_than_they_are_coded(
    rounded: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(FmpqError, match=r"'(round|floor)\w*' .* has no exact form"):
        fmpq_fx.convert(graph_of(RoundedOtherwise(rounded).eval(), images()), exact="require")
