"""Layers in integer arithmetic against integers: Python's, which have any size, and NumPy's."""

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from compressai.layers import GDN, MaskedConv2d
from torch import Tensor, nn

from fmpq_fx import FmpqError
from fmpq_fx.exact import ExactLayer, ExactLeakyReLU
from fmpq_fx.exact.fixed_point import MOST, Rescaling, exp, from_integers, to_integers
from fmpq_fx.quant import quantize_layer

STEP = 2.0**-12

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    "strided conv": (lambda: nn.Conv2d(4, 6, (3, 5), (2, 1), (2, 1), (1, 2)), (2, 4, 9, 11)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), (2, 4, 5, 7)),
    "mirrored conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 7)),
    "pointwise conv": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 7)),
    "masked conv": (lambda: MaskedConv2d(4, 6, 5, padding=2), (2, 4, 6, 7)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 5, 2, 2, 1), (2, 4, 5, 7)),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 5, 3, 2, 2, groups=2), (2, 4, 5, 3)),
    "linear": (lambda: nn.Linear(4, 6), (2, 3, 4)),
}


def grid(x: Tensor) -> Tensor:
    return from_integers(to_integers(x), x.dtype)


def quantized(make: Any, bits: int, activation_bits: int | None) -> Any:
    layer = quantize_layer(make(), bits, activation_bits).eval()
    if layer.input_quantizer is not None:
        layer.input_quantizer.freeze(-6.0, 7.3, False)
    return layer


@pytest.mark.parametrize("activation_bits", [None, 8, 12])
@pytest.mark.parametrize("bits", [2, 6, 10])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_it_is_the_fake_quantized_layer_to_half_a_step(
    make: Any, shape: tuple[int, ...], bits: int, activation_bits: int | None
) -> None:
    torch.manual_seed(bits)
    x = grid(3 * torch.randn(shape))
    layer = quantized(make, bits, activation_bits).double()  # float32 itself would be further away
    exact = ExactLayer(layer)
    with torch.no_grad():
        difference = (exact(x.double()) - layer(x.double())).abs()
    assert difference.max() < 0.51 * STEP
    assert torch.equal(exact(x), exact(x.double()).float())
    assert torch.equal(exact(x), grid(exact(x))), "fixed-point numbers, which float32 holds"


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_steps_per_channel_are_exact(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = quantized(make, 6, 8).double()
    if layer.spread_shape() is None:
        pytest.skip("its input has one step for all channels")
    layer.set_spread([-0.3 * channel for channel in range(shape[layer.channel_dim])])
    x = grid(3 * torch.randn(shape)).double()
    with torch.no_grad():
        assert (ExactLayer(layer)(x) - layer(x)).abs().max() < 0.51 * STEP


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_a_layer_that_the_plan_leaves_float_gets_weights_of_16_bits(
    make: Any, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = make(), grid(torch.randn(shape))
    with torch.no_grad():
        torch.testing.assert_close(ExactLayer(layer)(x), layer(x), rtol=0, atol=1e-3)


def convolved(integers: Any, x: Any, stride: int, padding: int) -> Any:
    """Convolve ``x`` (C, H, W) with ``integers`` (O, C, k, k) in NumPy integers."""
    k = integers.shape[2]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    view: Any = np.lib.stride_tricks.sliding_window_view
    windows = view(x, (k, k), (1, 2))[:, ::stride, ::stride]
    return np.einsum("ochw,cyxhw->oyx", integers, windows)


def rescaled(sums: Any, rescaling: Rescaling) -> Any:
    """Rescale in Python integers, which need no pieces."""
    piece = 24 if rescaling.wide else 0
    out = np.empty(sums.shape, dtype=object)
    for channel, (m, offset, unit) in enumerate(
        zip(rescaling.multiplier.flatten(), rescaling.offset.flatten(), rescaling.unit.flatten(), strict=True)
    ):
        shift = piece + int(Fraction(1) / Fraction(unit.item()) - 1).bit_length()
        for place in np.ndindex(sums.shape[1:]):
            value = int(sums[channel][place]) * int(m) + (int(offset) << piece)
            out[channel][place] = value >> shift
    return out


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_integers_of_numpy_give_the_same(stride: int, activation_bits: int | None, extreme: bool) -> None:
    torch.manual_seed(0)
    layer = quantized(lambda: nn.Conv2d(5, 4, 3, stride, 1), 8, activation_bits)
    if extreme:  # the largest sums that there can be, of either sign
        with torch.no_grad():
            layer.layer.weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1))
    exact = ExactLayer(layer)
    x = grid(2 * torch.randn(1, 5, 6, 7)) if not extreme else torch.full((1, 5, 6, 7), 5000.0)
    integers = layer.weight_quantizer.integers(layer.layer.weight).numpy().astype(np.int64)
    n = np.rint(x[0].double().numpy() * 4096).astype(np.int64).clip(-MOST, MOST)
    if exact.input_rescaling is not None:
        low, high = map(int, exact.input_range)
        flat = rescaled(n.reshape(1, -1), exact.input_rescaling).reshape(n.shape)
        n = flat.astype(np.int64).clip(low, high)
    sums = convolved(integers, n, stride, 1)
    assert np.abs(sums).max() <= exact.bound < 2**48
    if extreme:
        assert np.abs(sums).max() == exact.bound
    expected = rescaled(sums, exact.rescaling).astype(np.int64).clip(-MOST, MOST)
    assert np.array_equal(exact(x)[0].double().numpy() * 4096, expected)


@pytest.mark.parametrize("bound", [2**20, 2**27 - 1, 2**27, 2**48 - 1])
def test_rescaling_is_what_python_integers_give(bound: int) -> None:
    random = np.random.default_rng(0)
    factors = [Fraction(f) for f in 2.0 ** random.uniform(-30, 2.9, 60)]
    biases = [Fraction(b) for b in random.uniform(-(2**25), 2**25, 60)]
    rescaling = Rescaling(factors, biases, bound=bound, trailing=1)
    x = random.integers(-bound, bound, (60, 50), endpoint=True)
    x[:, :4] = -bound, bound, 0, 1
    found = rescaling(torch.from_numpy(x)[None].double())[0]
    assert np.array_equal(found.numpy(), rescaled(x, rescaling).astype(float))
    for row, factor, bias, results in zip(x, factors, biases, found.tolist(), strict=True):
        clipped = max(-MOST, min(MOST, bias))
        for value, result in zip(row.tolist(), results, strict=True):
            ideal = value * factor + clipped
            assert abs(result - ideal) <= 1.01 + abs(ideal - clipped) * 2**-23


def test_ties_are_rounded_up() -> None:
    rescaling = Rescaling([Fraction(1, 2)], [Fraction(0)], bound=100)
    assert rescaling(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [-1, 0, 1, 2]


def test_a_factor_beyond_fixed_point_is_refused() -> None:
    with pytest.raises(FmpqError, match="beyond fixed-point"):
        Rescaling([Fraction(9)], bound=2**40)
    with pytest.raises(FmpqError, match="GDN has no exact form"):
        ExactLayer(quantize_layer(GDN(4), 8))


def test_exponentials_are_correct_to_the_digit() -> None:
    logarithms = torch.linspace(-20, 20, 101)
    for logarithm, found in zip(logarithms.tolist(), exp(logarithms), strict=True):
        terms, term = (
            Fraction(1),
            Fraction(1),
        )  # the series, in fractions, of an argument that is halved six times
        for k in range(1, 60):
            term = term * Fraction(logarithm) / 64 / k
            terms += term
        assert abs(found / terms**64 - 1) < Fraction(1, 10**35)


def test_leaky_relu_in_integers() -> None:
    exact = ExactLeakyReLU(nn.LeakyReLU(0.01))
    n = torch.cat([torch.arange(-2000, 2000), torch.tensor([-MOST, MOST])])
    found = exact(n * STEP).double() * 4096
    m, s = int(exact.rescaling.multiplier), int(1 / exact.rescaling.unit).bit_length() - 1
    expected = [k if k >= 0 else (k * m + 2 ** (s - 1)) >> s for k in n.tolist()]
    assert found.tolist() == expected
    torch.testing.assert_close(found, nn.LeakyReLU(0.01)(n.double()), rtol=0, atol=0.51)


def test_float32_where_it_suffices_and_float64_else() -> None:
    few = ExactLayer(quantized(lambda: nn.Conv2d(4, 6, 3), 4, 8))
    assert few.bound < 2**24
    assert few.arithmetic == few.matrix.dtype == torch.float32
    assert ExactLayer(quantized(lambda: nn.Conv2d(4, 6, 3), 4, None)).arithmetic == torch.float64
    # Ten bits: bfloat16, as which a library may multiply float32, holds no such weights.
    assert ExactLayer(quantized(lambda: nn.Conv2d(4, 6, 1), 10, 8)).arithmetic == torch.float64


@pytest.mark.parametrize("bits", [4, 8])
def test_types_modes_and_autocast_change_nothing(bits: int) -> None:
    torch.manual_seed(0)
    exact = ExactLayer(quantized(lambda: nn.Conv2d(32, 8, 3, padding=1), bits, 8))
    x = grid(torch.randn(2, 32, 8, 8))
    expected = exact(x)
    for moved in (
        copy.deepcopy(exact).double(),
        copy.deepcopy(exact).bfloat16(),
        copy.deepcopy(exact).train(),
    ):
        assert torch.equal(moved(x), expected)
        assert moved.state_dict().keys() == exact.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(x), expected)
    assert torch.equal(exact(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(torch.cat([exact(part) for part in x.split(1)]), expected)
    assert not exact(x.requires_grad_()).requires_grad
