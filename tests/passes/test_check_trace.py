"""What a check of a graph against its model finds: other numbers, no RD loss, images of a wrong size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.check_trace import check_trace
from fmpq_fx.passes.trace import trace
from support.traced_models import (
    PLAIN,
    Codec,
    lively,
    photos,
)


def test_a_graph_that_computes_something_else_is_refused() -> None:
    model = Codec(lambda m, x: m.conv(x) * float(str(x.shape[-1]))).eval()
    with pytest.raises(FmpqError, match="does not compute what the model computes"):
        check_trace(model, trace(model, photos()), photos())


def ramp(m: Any, x: Tensor) -> Tensor:
    """Scale by what is kept for each size in a dictionary, which tracing finds filled."""
    width = x.shape[-1]
    if m.name(width) not in m.kept:
        m.kept[m.name(width)] = torch.arange(1, width + 1) / width
    return m.conv(x) * m.kept[m.name(width)]  # type: ignore[no-any-return]


def test_what_is_kept_from_an_earlier_run_is_named_where_the_graph_is_wrong() -> None:
    model: Any = Codec(ramp).eval()
    model.kept, model.name = {}, str
    check_trace(model, trace(model, photos()), photos())
    model(photos())
    with pytest.raises(
        FmpqError, match=r"a tensor \(64,\) that no recorded operation made: \S*test_check_trace\.py:\d+"
    ):
        check_trace(model, trace(model, photos()), photos())


def test_what_binds_a_graph_to_one_size_is_told() -> None:
    model: Any = Codec(ramp).eval()
    model.kept, model.name = {}, lambda width: width
    model(photos())
    with pytest.warns(
        UserWarning, match=r"may serve images of 64 x 64 alone(.|\n)*test_check_trace\.py:\d+: if m\.name"
    ):
        check_trace(model, trace(model, photos()), photos())


def test_a_random_forward_is_told_from_a_wrong_trace() -> None:
    model = Codec(lambda m, x: m.conv(x + torch.rand(1))).eval()
    with pytest.raises(FmpqError, match=r"another output each time(.|\n)*traced_models\.py"):
        check_trace(model, trace(model, photos()), photos())


REFUSED: dict[str, Callable[[Any], Any]] = {
    "likelihoods": lambda out: {"x_hat": out["x_hat"]},
    "'likelihoods'": lambda out: out["x_hat"],
    "no likelihoods": lambda out: {**out, "likelihoods": {}},
    "multiples of its stride": lambda out: {**out, "x_hat": out["x_hat"][..., 1:]},
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED)
def test_an_output_that_has_no_rd_loss_is_refused(words: str, change: Callable[[Any], Any]) -> None:
    class Changed(Codec):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return change(super().forward(x))  # type: ignore[no-any-return]

    model = Changed().eval()
    with pytest.raises(FmpqError, match=words):
        check_trace(model, trace(model), photos())


def test_images_that_do_not_suit_the_stride_are_refused_with_their_size() -> None:
    model = lively(PLAIN["mean-scale hyperprior"])
    for size in (8, 72):
        with pytest.raises(FmpqError, match=rf"(?s){size}.*multiple"):
            check_trace(model, trace(model), photos(1, size))
