"""Quantized layers against torch's own functions on weights that were quantized one channel at a time."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d
from torch import Tensor, nn

from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_class
from support.layer_cases import Rule, each_layer, effective, gdn, gdn1, made, output_channels, transposed


def naively_quantized(quantized: QuantizedLayer, bits: int) -> Tensor:
    """Return the float layer's weight on its grid; the steps are checked here, and used one by one."""
    layer = quantized.layer
    weight = effective(layer).clone()
    unsigned = isinstance(layer, GDN)
    high = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    steps = quantized.weight_quantizer.log_scale.detach().exp().flatten()
    rows = output_channels(layer, weight)
    assert len(steps) == len(rows), "one step per output channel"
    for row, step in zip(rows, steps, strict=True):
        assert step.item() == pytest.approx(row.abs().max().item() / high, rel=1e-6)
        row.copy_(torch.round(row / step).clamp(0 if unsigned else -high, high) * step)
    return weight


@each_layer
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_layer_is_the_float_one_with_quantized_weights(
    make: Callable[[], nn.Module], rule: Rule, bits: int
) -> None:
    layer = made(make)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(rule(layer, x, effective(layer)), layer(x)), "the rule of this test is the layer's"
    quantized = quantize_layer(layer, bits)
    weight = naively_quantized(quantized, bits)
    assert torch.equal(quantized.weight, weight.view_as(effective(layer)))
    assert torch.equal(quantized(x), rule(layer, x, weight))
    assert not torch.equal(quantized(x), layer(x)), "nothing was quantized"


@each_layer
def test_a_quantized_layer_is_called_as_the_float_one_is(make: Callable[[], nn.Module], rule: Rule) -> None:
    layer, x = made(make), torch.randn(2, 4, 8, 8)
    name = next(iter(inspect.signature(layer.forward).parameters))
    quantized, seen = quantize_layer(layer, 6, 8), list[Tensor]()
    quantized.register_forward_pre_hook(lambda _, args: seen.extend(args))
    assert torch.equal(quantized(**{name: x}), quantized(x))
    assert [each is x for each in seen] == [True, True], "hooks get the input by position"
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        quantized(x, nothing=x)


@pytest.mark.parametrize("extra", [0, 1])
def test_a_transposed_convolution_makes_an_output_of_the_size_asked_for(extra: int) -> None:
    layer = made(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    quantized, x = quantize_layer(layer, 6), torch.randn(2, 4, 8, 8)
    layer.weight.data = quantized.weight.detach()
    for size in ((15 + extra, 15), (2, 6, 15, 15 + extra)):
        assert torch.equal(quantized(x, output_size=size), layer(x, output_size=size))
        assert torch.equal(quantized(x, size), layer(x, size))


@each_layer
def test_what_the_weights_multiply_is_quantized(make: Callable[[], nn.Module], rule: Rule) -> None:
    layer = made(make)
    x = torch.randn(2, 4, 8, 8)
    quantized = quantize_layer(layer, 6, 5)
    assert quantized.input_quantizer is not None
    float_input = quantized(x)
    assert torch.equal(float_input, rule(layer, x, naively_quantized(quantized, 6))), (
        "observing changes nothing"
    )
    assert quantized.input_quantizer.range == (x.min().item(), x.max().item())
    quantized.input_quantizer.freeze(-2.0, 2.5, False)
    step, zero = quantized.input_quantizer.log_scale.detach().exp(), round(2.0 / (4.5 / 31))
    on_grid = ((torch.round(x / step) + zero).clamp(0, 31) - zero) * step
    weight = naively_quantized(quantized, 6)
    # GDN's gamma multiplies what is in the norm; what the norm divides stays as it is.
    expected = rule(layer, x, weight, on_grid) if rule in (gdn, gdn1) else rule(layer, on_grid, weight)
    assert torch.equal(quantized(x), expected)
    assert not torch.equal(quantized(x), float_input)


@each_layer
def test_steps_that_are_not_fitted_yet_are_as_if_fitted_once_they_are(
    make: Callable[[], nn.Module], rule: Rule
) -> None:
    del rule
    fitted, later = (quantize_layer(made(make), 5, 6, clip=0.8, fitted=whether) for whether in (True, False))
    assert not later.weight_quantizer.log_scale.any()
    if fitted.spread_shape() is not None:
        channels: Any = getattr(fitted.layer, "in_channels", 8)
        fitted.set_spread(spread := [0.1 * n for n in range(channels)])
        later.set_spread(spread, fitted=False)
        assert not later.weight_quantizer.log_scale.any()
    later.set_clip(later.weight_quantizer.clip)
    assert torch.equal(later.weight, fitted.weight)
    assert later.layout == tuple(later.integers.shape)


@each_layer
def test_steps_per_input_channel_are_folded_into_the_weight(
    make: Callable[[], nn.Module], rule: Rule
) -> None:
    """The step of a weight is its output's divided by its input's, so that all products of an output have one step."""
    quantized = quantize_layer(made(make), 5, 6)
    layer, channel, x = quantized.layer, quantized.channel_dim, torch.randn(2, 4, 8, 8)
    if quantized.spread_shape() is None:
        return
    assert quantized.input_quantizer is not None
    spread = 0.5 ** torch.arange(x.size(channel))  # powers of two: nothing is rounded by them
    quantized.set_spread(spread.log().tolist())
    quantized.input_quantizer.freeze(-2.0, 2.5, False)

    weight = effective(layer)
    over_inputs = [1] * weight.ndim
    over_inputs[0 if rule is transposed else 1] = -1
    folded = weight * spread.view(over_inputs)
    for row in output_channels(layer, folded):
        step = row.abs().max() / 15
        row.copy_(torch.round(row / step) * step)
    of_channels = spread.view(-1, *[1] * (-channel - 1))
    input_step, zero = 4.5 / 63, round(2.0 / (4.5 / 63))
    steps = input_step * of_channels
    on_grid = ((torch.round(x / steps) + zero).clamp(0, 63) - zero) * steps
    torch.testing.assert_close(quantized.quantized_input(x), on_grid)
    torch.testing.assert_close(quantized.weight, folded / spread.view(over_inputs))
    torch.testing.assert_close(quantized(x), rule(layer, on_grid, quantized.weight))

    quantized(x).square().sum().backward()
    gradient = quantized.weight_quantizer.log_spread
    assert gradient is not None
    assert gradient.grad is not None
    assert gradient.grad.count_nonzero() == len(spread), "the spread is learned"
    quantized.set_spread(())
    assert torch.equal(quantized.integers, quantize_layer(made(make), 5).integers)


@each_layer
def test_what_is_not_the_weight_is_left_alone(make: Callable[[], nn.Module], rule: Rule) -> None:
    layer = made(make)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    quantized = quantize_layer(layer, 2)
    quantized(torch.randn(2, 4, 8, 8))
    assert quantized.layer is layer
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@each_layer
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation_bits", [None, 5])
def test_without_gradients_the_values_are_the_same_bits(
    make: Callable[[], nn.Module], rule: Rule, activation_bits: int | None, autocast: bool
) -> None:
    quantized = quantize_layer(made(make), 4, activation_bits)
    if quantized.input_quantizer is not None:
        quantized.input_quantizer.freeze(-1.0, 2.0, False)
    x = torch.randn(2, 4, 8, 8)
    given = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = quantized(x)
        with torch.no_grad():
            found = quantized(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(x, given), "the input was written to"


@each_layer
def test_all_parameters_get_gradients(make: Callable[[], nn.Module], rule: Rule) -> None:
    quantized = quantize_layer(made(make), 4, 6)
    assert quantized.input_quantizer is not None
    quantized.input_quantizer.freeze(-1.0, 1.0, False)
    quantized(torch.randn(2, 4, 8, 8)).square().sum().backward()
    for name, parameter in quantized.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_masked_weights_are_zero_and_get_no_gradient() -> None:
    layer = made(lambda: MaskedConv2d(4, 6, 5, padding=2))
    assert isinstance(layer, MaskedConv2d)
    quantized = quantize_layer(layer, 4)
    hidden = (layer.mask == 0).expand_as(layer.weight)
    assert (layer.weight[hidden] != 0).any(), "before its first forward CompressAI's layer has not masked yet"
    quantized(torch.randn(1, 4, 8, 8)).square().sum().backward()
    assert layer.weight.grad is not None
    assert not quantized.weight[hidden].any()
    assert not layer.weight.grad[hidden].any()


def test_gamma_is_quantized_after_its_reparametrization() -> None:
    """The stored parameter is the square root of gamma plus a pedestal; its grid would be quite another."""
    layer = made(lambda: GDN(4))
    assert isinstance(layer, GDN)
    quantized = quantize_layer(layer, 3)
    step = quantized.weight_quantizer.scale.detach()
    assert torch.equal(quantized.weight, quantized.weight_quantizer.integers(effective(layer)) * step)
    assert quantized.weight.min() >= 0
    assert quantized.weight_quantizer.integers(effective(layer)).max() == 7, (
        "unsigned: all 3 bits are magnitude"
    )


class NewInit(nn.Conv2d):
    """Another constructor, the same computation."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)


class NewForward(nn.Conv2d):
    """Another computation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class NewConvForward(nn.Conv2d):
    """Another computation, one level below."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, weight * 2, bias)
        return y


class NewMask(MaskedConv2d):
    """A masked convolution of a user."""


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(3, 3, 1), "QuantizedConv2d"),
        (NewInit(3), "QuantizedConv2d"),
        (NewForward(3, 3, 1), None),
        (NewConvForward(3, 3, 1), None),
        (NewMask(3, 3, 3), "QuantizedMaskedConv2d"),
        (CheckerboardMaskedConv2d(3, 3, 3), "QuantizedMaskedConv2d"),
        (GDN(3), "QuantizedGDN"),
        (GDN1(3), "QuantizedGDN1"),
        (nn.Conv1d(3, 3, 1), None),
        (nn.ReLU(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_subclass_counts_as_its_base_as_long_as_it_computes_the_same(
    layer: nn.Module, expected: str | None
) -> None:
    found = quantized_class(layer)
    assert (found and found.__name__) == expected


def test_a_layer_that_cannot_be_quantized_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"NewForward cannot be quantized.*Conv2d.*GDN"):
        quantize_layer(NewForward(3, 3, 1), 4)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 3, 1), lambda: GDN(3)], ids=["conv", "GDN"])
def test_repr_is_one_line_with_all_bits(make: Callable[[], nn.Module]) -> None:
    text = repr(quantize_layer(make(), 3, 8))
    assert "\n" not in text
    assert "3-bit" in text
    assert "8-bit" in text
    assert type(make()).__name__ + "(" in text
