"""Histograms of inputs: what they say of rounding is what rounding does."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fmpq_fx.passes.clip.histograms import OCTAVE, Histogram


def values(shape: tuple[int, ...]) -> Tensor:
    """Return normal values, whose channels (dimension 1) differ in range."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([1.0, 0.1, 30.0]).view(-1, *[1] * (len(shape) - 2))
    return normal * factors


def peaks_of(x: Tensor) -> np.ndarray:
    peaks: np.ndarray = x.abs().transpose(0, 1).flatten(1).amax(1).double().numpy()
    return peaks


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("sides", [(1.0, 1.0), (0.25, 1.0)])
def test_errors_are_those_of_rounding(power: int, sides: tuple[float, float]) -> None:
    x, levels = values((2, 3, 40, 40)).double(), 255
    histogram = Histogram(peaks_of(x), -3)
    histogram.count(x)
    sizes = [int(np.ceil(OCTAVE * np.log2(peaks_of(x).max()))) - less for less in (0, 8, 16, 24, 48)]
    found = histogram.mean_errors(sides, levels, power, sizes)
    for size, of_channels in zip(sizes, found, strict=True):
        end = 2.0 ** (size / OCTAVE)
        step = sum(sides) * end / levels
        rounded = (x / step).round().mul(step).clamp(-sides[0] * end, sides[1] * end)
        exact = (rounded**power - x**power).square().mean((0, 2, 3)).numpy()
        assert of_channels == pytest.approx(exact, rel=0.25)
    assert histogram.mean_squares == pytest.approx(x.square().mean((0, 2, 3)).numpy(), rel=0.02)


def test_what_is_counted_does_not_depend_on_the_shape() -> None:
    x = values((1, 3, 6, 5))
    whole = Histogram(peaks_of(x), -3)
    whole.count(x)
    rows = Histogram(peaks_of(x), -3)
    for row in x[0].unbind(1):
        rows.count(row.unsqueeze(1))  # a single input
    features = Histogram(peaks_of(x), -1)
    features.count(x[0].flatten(1).T)
    for other in (rows, features):
        assert np.array_equal(other.counts, whole.counts)
        assert other.total == whole.total == 30


def test_values_far_away_are_counted() -> None:
    histogram = Histogram(np.ones(1), -1)
    histogram.count(torch.tensor([[0.0], [1e-30], [-1e30], [float("inf")], [float("nan")]]))
    assert histogram.total == 5
    assert histogram.counts.sum() == 4, "all but 0"
    assert histogram.counts[0, -1] == histogram.counts[1, -1] == 1
