"""Fixed-point numbers in float tensors, and multiplication by a real number as an integer multiply and shift.

On the path from the coded latents to the entropy coder every number is an integer below 2^24 times 2^-12, which
float32 holds exactly, and every operation on them is one on integers below 2^53, which float64 holds exactly. So
results depend neither on the order of a sum nor on the device, the library, the memory layout or the type of the
tensors. The real numbers that the integers are made from, steps above all, are computed by :mod:`decimal`, whose
results are specified to the digit. The last bit of the platform's own ``exp`` differs between platforms.
"""

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError

FRACTION_BITS = 12
"""Numbers on the path are multiples of 2^-12. The first two scales of CompressAI's table are 59 such steps apart."""

MOST = 2**24 - 1
"""Integers on the path saturate at this magnitude, which stands for a number just below 4096."""

WIDEST = 2**48
"""Sums of products stay below this."""

_NARROW = 2**27  # sums below this are multiplied in one piece
_PIECE = 24  # bits of the lower of two pieces
_DECIMAL = Context(prec=40, rounding=ROUND_HALF_EVEN)


def to_integers(x: Tensor) -> Tensor:
    """Return the integers, float64, that stand for ``x``; numbers that are not fixed-point are rounded."""
    return (x.double() * 2.0**FRACTION_BITS).round_().clamp_(-MOST, MOST)


def from_integers(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that ``integers``, float64, stand for, saturated, in ``dtype``.

    A type smaller than float32 rounds them further, in the same way on every machine.
    """
    return integers.clamp(-MOST, MOST).mul_(2.0**-FRACTION_BITS).to(dtype)


def exp(logarithms: Tensor) -> list[Fraction]:
    """Return the exponentials of all elements, to 40 decimal digits, the same on every platform."""
    return [Fraction(_DECIMAL.exp(Decimal(value))) for value in logarithms.detach().flatten().tolist()]


class IntegerModule(nn.Module):
    """A module whose buffers are integers in float64 and stay so, whatever type the model is moved to."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(t: Tensor) -> Tensor:
            result: Tensor = fn(t)
            return result if result.dtype == t.dtype else t.to(result.device)

        return super()._apply(moved, recurse)


class Rescaling(IntegerModule):
    """Integers times a real factor plus a real bias per channel, rounded: integer multiply, add and shift.

    With integers m (below 2^24) and s for which m / 2^s is next to the factor, and the bias, multiplied by 2^s, and
    half a unit of the result together in the integer ``offset``::

        y = floor((x * m + offset) / 2^s)

    Above 2^27, where that product would not fit, x is taken as two pieces, x = high * 2^24 + low::

        y = floor((high * m + floor(low * m / 2^24) + offset) / 2^(s - 24))

    Either way all numbers are below 2^53, and m / 2^s misses the factor by 2^-24 of it, or y by half a unit.

    Args:
        factors: per channel, or one for all.
        biases: per channel, in units of the result; None is 0. At most 2^24 in magnitude; beyond, it saturates.
        bound: the largest magnitude of x, below 2^48.
        trailing: how many dimensions of x follow that of the channels.

    Raises:
        FmpqError: a factor is so large that no integer multiplier stands for it.
    """

    def __init__(
        self,
        factors: Sequence[Fraction],
        biases: Sequence[Fraction] | None = None,
        *,
        bound: int = MOST,
        trailing: int = 0,
    ):
        super().__init__()
        assert bound < WIDEST
        self.wide = bound >= _NARROW
        piece = _PIECE if self.wide else 0
        # Without a bias the offset is half a unit, which leaves more room than a bias of 24 bits does.
        most = 50 if biases is None else 28
        columns: list[tuple[int, int, float]] = []
        for factor, bias in zip(factors, biases or [Fraction(0)] * len(factors), strict=True):
            multiplier, shift = _multiplier(factor, 27 if self.wide else 24, piece, piece + most)
            rest = shift - piece
            offset = round(max(-MOST, min(MOST, bias)) * 2**rest) + (2**rest >> 1)
            columns.append((multiplier, offset, math.ldexp(1.0, -rest)))
        for name, values in zip(("multiplier", "offset", "unit"), zip(*columns, strict=True), strict=True):
            constants = torch.tensor(values, dtype=torch.float64)
            self.register_buffer(name, constants.view(-1, *[1] * trailing))

    multiplier: Tensor
    offset: Tensor
    unit: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return y, float64, of the shape of ``x``, integers of any type."""
        x = x.double()
        if self.wide:
            high = (x * 2.0**-_PIECE).floor_()
            low = x - high * 2.0**_PIECE
            product = (low * self.multiplier).mul_(2.0**-_PIECE).floor_().add_(high.mul_(self.multiplier))
        else:
            product = x * self.multiplier
        return product.add_(self.offset).mul_(self.unit).floor_()


def _multiplier(factor: Fraction, bits: int, least: int, most: int) -> tuple[int, int]:
    """Return integers (m, s), |m| at most 2^bits and s in ``least`` … ``most``, with m / 2^s next to ``factor``."""
    _, exponent = math.frexp(factor)  # of the nearest float; |factor| is at most 2^exponent
    shift = min(bits - exponent, most)
    if shift < least:
        raise FmpqError(f"it multiplies by {float(factor):.3g}, which is beyond fixed-point numbers")
    # round(factor * 2**shift), without the gcd that a product of fractions takes.
    multiplier, rest = divmod(factor.numerator << shift, factor.denominator)
    half = 2 * rest - factor.denominator
    return multiplier + (half > 0 or (half == 0 and multiplier % 2)), shift
