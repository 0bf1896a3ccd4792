"""Layers in exact integer arithmetic: the same bits on every machine.

They take and return ordinary float tensors that hold fixed-point numbers (:mod:`fmpq_fx.exact.fixed_point`). So they
fit into a model of any class, between its own concatenations, chunks and coding loops. They use matrix products and
never a library's convolution, which may multiply numbers that are no integers, as Winograd and FFT do.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

import torch
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.exact.fixed_point import (
    FRACTION_BITS,
    MOST,
    WIDEST,
    IntegerModule,
    Rescaling,
    exp,
    from_integers,
    to_integers,
)
from fmpq_fx.exact.products import product_of
from fmpq_fx.quant import CalledAlike, QuantizedLayer, quantize_layer
from fmpq_fx.quant.fake_quant import ActivationFakeQuant

_FLOAT32_SUMS = 2**24  # float32 holds all integers up to here
_FLOAT32_OPERANDS = 2**8  # bfloat16 holds them up to here; a library may multiply float32 numbers in bfloat16
_FLOAT_WEIGHT_BITS = 16  # bits of the integers for weights that the plan leaves float


class ExactLayer(CalledAlike, IntegerModule):
    """A layer with integer weights on integer inputs, summed exactly and rescaled to fixed-point numbers.

    Inputs become integers with the steps, zero point and range of the layer's input quantizer. Without a quantizer, or
    if it passes whole numbers unchanged, fixed-point numbers enter as they are, 24 bits wide: that costs nothing, and a
    coded latent, a whole number plus a mean, keeps its fraction. Weights that the plan leaves float get 16 bits, and
    fewer if sums would not fit.

    Args:
        layer: a quantized layer, or a float one.
        most: the magnitude at which the integers of outputs saturate. It is smaller if outputs are added up later, so
            that their sum has room.

    Raises:
        FmpqError: the layer cannot be computed exactly.
    """

    def __init__(self, layer: nn.Module, most: int = MOST):
        super().__init__(layer)
        self.most = most
        quantized = layer if isinstance(layer, QuantizedLayer) else quantize_layer(layer, 8)
        product = product_of(quantized.layer)
        if product is None:
            raise FmpqError(f"a {type(quantized.layer).__name__} has no exact form")
        self.product, self.kind = product, type(quantized.layer).__name__
        if isinstance(layer, QuantizedLayer):
            integers, steps = layer.integers, exp(layer.weight_quantizer.log_scale)
        else:
            integers, steps = _integers_of_float(quantized.by_output(quantized.float_weight().detach()))
        magnitudes = integers.abs()
        largest_sum = max(1, int(magnitudes.sum((1, 2)).max()))

        quantizer = quantized.input_quantizer if isinstance(layer, QuantizedLayer) else None
        self.input_rescaling: Rescaling | None = None
        step = Fraction(1, 2**FRACTION_BITS)
        low, high = -MOST, MOST
        if quantizer is not None and not quantizer.observing and not quantizer.whole:
            (step,) = exp(quantizer.log_scale)
            low, high = _range(quantizer)
            spread = quantized.weight_quantizer.log_spread
            factors = [Fraction(1)] if spread is None else exp(spread)
            units = 1 / (step * 2**FRACTION_BITS)
            self.input_rescaling = Rescaling(
                [units / factor for factor in factors], trailing=product.trailing
            )
        limit = (WIDEST - 1) // largest_sum
        low, high = max(low, -limit), min(high, limit)
        self.register_buffer("input_range", torch.tensor([low, high], dtype=torch.float64))
        self.bound = largest_sum * max(-low, high)
        operands = max(-low, high, int(magnitudes.max()))
        narrow = self.bound < _FLOAT32_SUMS and operands <= _FLOAT32_OPERANDS
        self.arithmetic = torch.float32 if narrow else torch.float64
        self.register_buffer("matrix", product.matrix(integers).to(self.arithmetic))

        bias = quantized.bias
        numbers = [0.0] * len(steps) if bias is None else bias.detach().flatten().tolist()
        unit = step * 2**FRACTION_BITS
        self.rescaling = Rescaling(
            [unit * weight_step for weight_step in steps],
            [Fraction(number) * 2**FRACTION_BITS for number in numbers],
            bound=self.bound,
            trailing=self.product.trailing,
        )

    matrix: Tensor
    input_range: Tensor

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x``, in fixed-point numbers; other numbers in ``x`` are rounded first.

        The shapes are those of the float layer. There are no gradients.
        """
        return self.outputs(self.sums(self.input_integers(x)), x.dtype)

    def outputs(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the outputs in ``dtype`` for ``sums``, the sums of products."""
        return from_integers(self.rescaling(sums).clamp_(-self.most, self.most), dtype)

    def input_integers(self, x: Tensor) -> Tensor:
        """Return the integers that the weights multiply, in the type of :attr:`arithmetic`."""
        integers = to_integers(x.detach())
        if self.input_rescaling is not None:
            integers = self.input_rescaling(integers)
        return integers.clamp_(*self.input_range).to(self.arithmetic)

    def sums(self, integers: Tensor) -> Tensor:
        """Return the sums of products, below :attr:`bound`."""
        with without_autocast(integers.device):
            return self.product.sums(integers, self.matrix)

    def __repr__(self) -> str:
        """Return one line: the range of the inputs, the largest sum, and the type that holds it exactly."""
        low, high = map(int, self.input_range.tolist())
        sums = f"sums={self.bound} < 2^{self.bound.bit_length()}"
        return f"{type(self).__name__}({self.kind}, inputs={low} … {high}, {sums}, {self.arithmetic})"


class ExactLeakyReLU(CalledAlike, IntegerModule):
    """LeakyReLU on fixed-point numbers: negative ones times the slope, rounded to the nearest fixed-point number."""

    def __init__(self, layer: nn.LeakyReLU):
        super().__init__(layer)
        self.slope = layer.negative_slope
        self.rescaling = Rescaling([Fraction(layer.negative_slope)])

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x``, of any shape."""
        integers = to_integers(x.detach())
        return from_integers(torch.where(integers < 0, self.rescaling(integers), integers), x.dtype)

    def __repr__(self) -> str:
        """Return one line, as the float module does."""
        return f"{type(self).__name__}(negative_slope={self.slope})"


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within the block, tensors on ``device`` keep their types: autocast would compute in half precision."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _range(quantizer: ActivationFakeQuant) -> tuple[int, int]:
    """Return the least and the largest integer of inputs, minus the zero point."""
    zero = min(max(round(quantizer.zero_point.item()), 0), quantizer.high)
    return -zero, quantizer.high - zero


def _integers_of_float(rows: Tensor) -> tuple[Tensor, list[Fraction]]:
    """Return integers for float weights (out, in, places), and their steps, one per output.

    Steps are powers of two. Multiplication by them is exact, so the integers are the same on every platform.
    """
    rows = rows.double()
    peaks = torch.frexp(rows.abs().amax((1, 2))).exponent
    scaled, steps = [], []
    for row, shift in zip(rows, (_FLOAT_WEIGHT_BITS - 1 - peaks).tolist(), strict=True):
        integers = (row * math.ldexp(1.0, shift)).round().long()
        # Sums have room for 24 bits besides those of the inputs.
        excess = max(0, int(integers.abs().sum()).bit_length() - 24)
        scaled.append((row * math.ldexp(1.0, shift - excess)).round().long())
        steps.append(Fraction(2) ** (excess - shift))
    return torch.stack(scaled), steps
