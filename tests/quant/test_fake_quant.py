"""Fake quantization: exact values, and gradients against formulas worked out by hand or by differences."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fmpq_fx.quant import ActivationFakeQuant, WeightFakeQuant

# (shape, dimensions that share a step, the output channels' dimensions)
SHAPES = {
    "conv": ((5, 3, 3, 3), (1, 2, 3)),
    "depthwise": ((6, 1, 3, 3), (1, 2, 3)),
    "transposed": ((3, 5, 3, 3), (0, 2, 3)),
    "transposed, 2 groups": ((2, 3, 4, 3, 3), (1, 3, 4)),
    "linear": ((5, 7), (1,)),
}


def channels(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return ``weight`` as (output channels, elements that share a step)."""
    kept = [d for d in range(weight.ndim) if d not in dims]
    return weight.permute(*kept, *dims).flatten(0, len(kept) - 1).flatten(1)


@pytest.mark.parametrize(("shape", "dims"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_channel_is_integers_times_its_own_step(
    shape: tuple[int, ...], dims: tuple[int, ...], bits: int, signed: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) if signed else torch.rand(shape)
    quantizer = WeightFakeQuant(weight, bits, dims, signed=signed)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -high if signed else 0
    rows, steps = channels(weight, dims), quantizer.log_scale.detach().exp().flatten()
    found, integers = channels(quantizer(weight), dims), channels(quantizer.integers(weight), dims)
    assert len(steps) == len(rows), "one step per output channel"
    assert integers.dtype == torch.int32
    for row, step, values, row_integers in zip(rows, steps, found, integers, strict=True):
        assert step.item() == pytest.approx(row.abs().max().item() / high, rel=1e-6)
        expected = torch.tensor([max(low, min(high, round((w / step).item()))) for w in row])
        assert torch.equal(row_integers, expected.int())
        assert torch.equal(values, expected * step)
        assert expected.abs().max() == high, "min-max: the largest magnitude is the last integer"


def test_quantizing_what_is_quantized_changes_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 5, 5)
    for bits in (2, 3, 7, 10, 16):
        quantizer = WeightFakeQuant(weight, bits, (1, 2, 3))
        once = quantizer(weight)
        assert torch.equal(quantizer(once), once)


def test_a_channel_of_zeros_stays_zero_and_disturbs_no_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4)
    weight[1] = 0
    weight.requires_grad_()
    quantizer = WeightFakeQuant(weight, 4, (1,))
    values = quantizer(weight)
    values.square().sum().backward()
    assert torch.equal(values[1], torch.zeros(4))
    assert quantizer.log_scale.grad is not None
    assert quantizer.log_scale.isfinite().all()
    assert quantizer.log_scale.grad.isfinite().all()


def test_clip_narrows_the_range_and_cuts_outliers_exactly_to_its_end() -> None:
    weight = torch.tensor([[3.0, -2.5, 1.6, 1.8, 0.4, -0.1]])
    quantizer = WeightFakeQuant(weight, 3, (1,), clip=0.5)  # 3 * 0.5 is the integer 3, so the step is 0.5
    step = quantizer.scale.detach()
    assert step.item() == pytest.approx(0.5, rel=1e-6)
    assert quantizer.integers(weight).tolist() == [[3, -3, 3, 3, 1, 0]]
    assert torch.equal(quantizer(weight), torch.tensor([[3.0, -3, 3, 3, 1, 0]]) * step)


def test_gradient_of_a_weight_is_straight_through_inside_and_the_leak_outside() -> None:
    weight = torch.tensor([[3.0, -2.5, 1.6, 1.8, 0.4, -0.1]], requires_grad=True)
    factors = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    quantizer = WeightFakeQuant(weight, 3, (1,), clip=0.5, leak=0.1)
    (quantizer(weight) * factors).sum().backward()
    # 3 / 0.5, -2.5 / 0.5 and 1.8 / 0.5 round to 6, -5 and 4, beyond 3; 1.6 / 0.5 rounds to 3.
    assert weight.grad is not None
    assert torch.equal(weight.grad, factors * torch.tensor([[0.1, 0.1, 1, 0.1, 1, 1]]))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_gradient_of_log_scale_is_the_difference_quotient_of_the_surrogate(signed: bool) -> None:
    """The surrogate holds rounding residuals and clip decisions fixed, as straight-through estimators do."""
    torch.manual_seed(0)
    weight = torch.randn(3, 40, dtype=torch.float64)
    weight = weight if signed else weight.abs()
    factors = torch.randn(3, 40, dtype=torch.float64)
    quantizer = WeightFakeQuant(weight, 3, (1,), signed=signed, clip=0.5, leak=0)
    (quantizer(weight) * factors).sum().backward()

    log_scale = quantizer.log_scale.detach().unsqueeze(1)
    units = weight / log_scale.exp()
    ends = units.round().clamp(quantizer.low, quantizer.high)
    clipped = units.round() != ends
    assert clipped.any(1).all(), "both branches are tested"

    def surrogate(log_scale: Tensor) -> Tensor:
        moving = weight / log_scale.exp() + (units.round() - units)
        return (factors * torch.where(clipped, ends, moving) * log_scale.exp()).sum(1)

    difference = (surrogate(log_scale + 1e-5) - surrogate(log_scale - 1e-5)) / 2e-5
    lsq = 1 / math.sqrt(40 * quantizer.high)  # elements per channel, not of the tensor
    assert quantizer.log_scale.grad is not None
    torch.testing.assert_close(quantizer.log_scale.grad.flatten(), difference * lsq, rtol=1e-7, atol=1e-9)


def test_the_leak_reaches_the_scale_as_well() -> None:
    """By log s, s * f(w / s) has s * f - w * f', where the leaky clip f is 1 + leak * (w / s - 1) above 1."""
    weight = torch.tensor([[4.0, 2.2, -3.0]], dtype=torch.float64)
    quantizer = WeightFakeQuant(weight, 2, (1,), clip=0.5, leak=0.05)  # integers -1 … 1, step 2
    quantizer(weight).sum().backward()
    by_hand = 2 * 0.95 + (2 - 2.2) - 2 * 0.95  # -3 / 2 rounds to -2, outside
    assert quantizer.log_scale.grad is not None
    assert quantizer.log_scale.grad.item() == pytest.approx(by_hand / math.sqrt(3 * 1), rel=1e-7)


def frozen(
    bits: int, low: float, high: float, *, integral: bool = False, leak: float = 0.05
) -> ActivationFakeQuant:
    quantizer = ActivationFakeQuant(bits, torch.zeros(1), leak=leak)
    quantizer.freeze(low, high, integral)
    return quantizer


def test_an_observer_hands_on_its_input_and_keeps_the_range_of_all_of_it() -> None:
    quantizer = ActivationFakeQuant(8, torch.zeros(1))
    for x in (torch.tensor([[-0.25, 1.0]]), torch.tensor([[0.5, 3.5]])):
        assert quantizer(x) is x
    assert quantizer.range == (-0.25, 3.5)
    assert not quantizer.integral
    quantizer.observe()
    assert quantizer.range == (0, 0), "what was seen before observe() is forgotten"
    quantizer(torch.tensor([[2.0, 5.0]]))
    assert quantizer.range == (0, 5), "zero is in the range even where it was not in the input"


def test_zero_is_represented_exactly_whatever_the_range() -> None:
    torch.manual_seed(0)
    for low, high in (torch.rand(50, 2, dtype=torch.float64) * torch.tensor([-3, 7])).tolist():
        for bits in (2, 8, 10):
            quantizer = frozen(bits, low, high)
            assert torch.equal(quantizer(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_frozen_values_are_those_of_affine_integers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4) * 2
    quantizer = frozen(4, -1.5, 3.0)  # the step is 4.5 / 15 = 0.3, the zero point 5
    step = quantizer.log_scale.detach().exp()
    assert step.item() == pytest.approx(0.3, rel=1e-6)
    expected = torch.tensor([max(0, min(15, round((v / step).item()) + 5)) - 5 for v in x.flatten()])
    assert torch.equal(quantizer(x), (expected * step).view_as(x))
    assert (x > 3.1).any(), "clipping is tested"


def test_whole_numbers_pass_unchanged_where_they_fit() -> None:
    x = torch.arange(-55.0, 201.0).view(1, -1)  # 256 integers
    quantizer = ActivationFakeQuant(8, x)
    quantizer(x)
    quantizer.freeze(*quantizer.range, quantizer.integral)
    assert quantizer.log_scale.exp().item() == 1
    assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize(
    ("x", "step"),
    [([-56.0, 200.0], 256 / 255), ([0.0, 0.5, 100.0], 100 / 255), ([0.0, 0.0], 1.0)],
    ids=["too wide", "not whole", "only zeros"],
)
def test_the_step_where_whole_numbers_do_not_fit_or_are_none(x: list[float], step: float) -> None:
    values = torch.tensor([x])
    quantizer = ActivationFakeQuant(8, values)
    quantizer(values)
    quantizer.freeze(*quantizer.range, quantizer.integral)
    assert quantizer.log_scale.exp().item() == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.3], ids=["whole zero point", "fractional zero point"])
def test_gradients_of_an_activation(shift: float) -> None:
    """Zero point 1, step 1, integers 0 … 3: the values -1 … 2 are inside. What is fractional is rounded."""
    x = torch.tensor([[-3.0, -1.2, 0.4], [1.9, 2.2, 7.0]], requires_grad=True)
    factors = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    quantizer = frozen(2, -1, 2, leak=0.1)
    with torch.no_grad():
        quantizer.zero_point.add_(shift)
    y = quantizer(x)
    assert torch.equal(y, torch.tensor([[-1.0, -1, 0], [2, 2, 2]]))
    (y * factors).sum().backward()
    slopes = torch.tensor([[0.1, 1, 1], [1, 1, 0.1]])
    assert x.grad is not None
    assert torch.equal(x.grad, factors * slopes)
    lsq = 1 / math.sqrt(3 * 3)  # elements of one sample times the last integer
    outside = slopes < 1
    by_element = torch.where(outside, 0.9 * y.detach(), y.detach() - x.detach())
    by_scale = (factors * by_element).sum().item() * lsq
    assert quantizer.log_scale.grad is not None
    assert quantizer.zero_point.grad is not None
    assert quantizer.log_scale.grad.item() == pytest.approx(by_scale, rel=1e-6)
    assert quantizer.zero_point.grad.item() == pytest.approx((1 + 6) * -0.9 * lsq, rel=1e-6)


@pytest.mark.parametrize("zero_point", [0.0, 15.0, -1.0], ids=["never negative", "never positive", "drifted"])
def test_a_zero_point_learns_at_the_ends_of_its_range_too(zero_point: float) -> None:
    """After a ReLU every zero point is 0: without a gradient there it would stay 0 for good."""
    quantizer = frozen(4, -1, 1)
    with torch.no_grad():
        quantizer.zero_point.fill_(zero_point)
    quantizer(torch.tensor([[-9.0, 9.0, 7.0]])).sum().backward()
    assert quantizer.zero_point.grad is not None
    assert quantizer.zero_point.grad.item() < 0


def test_float64_stays_float64() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3)
    assert WeightFakeQuant(weight, 8, (1,))(weight).dtype == torch.float64
    quantizer = frozen(8, -1, 1).to(torch.float64)
    assert quantizer(x.double()).dtype == torch.float64


def test_a_copy_and_a_loaded_state_quantize_alike() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3), torch.randn(2, 3)
    trained, trained_input = WeightFakeQuant(weight, 4, (1,)), frozen(8, -2, 2)
    with torch.no_grad():
        trained.log_scale.add_(0.3)
        trained_input.log_scale.sub_(0.3)
        trained_input.zero_point.add_(2)
    fresh, fresh_input = WeightFakeQuant(torch.randn(4, 3), 4, (1,)), frozen(8, 0, 1)
    fresh.load_state_dict(trained.state_dict())
    fresh_input.load_state_dict(trained_input.state_dict())
    for twin in (fresh, copy.deepcopy(trained)):
        assert torch.equal(twin(weight), trained(weight))
    for other in (fresh_input, copy.deepcopy(trained_input)):
        assert torch.equal(other(x), trained_input(x))


def test_a_copy_of_an_observer_observes_on_its_own() -> None:
    observer = ActivationFakeQuant(8, torch.zeros(1))
    observer(torch.tensor([[1.0]]))
    twin = copy.deepcopy(observer)
    twin(torch.tensor([[5.0]]))
    assert (observer.range, twin.range) == ((0, 1), (0, 5))
