"""Fixed-point numbers in float tensors, and multiplication by a real number as an integer multiply and shift.

On the entropy path, from the coded latents to the entropy coder, every number is an integer below 2^24 times 2^-12,
which float32 holds exactly. Every operation computes with integers below 2^53, which float64 holds exactly. So results
depend neither on the order of a sum nor on the device, the library, the memory layout or the type of the tensors. The
exponentials that steps are made from are computed by :mod:`decimal`, whose results are specified to the digit; the last
bit of ``exp`` differs between platforms.
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
"""Integers on the path saturate at this magnitude, which is a number just below 4096."""

WIDEST = 2**48
"""Sums of products stay below this."""

_NARROW = 2**27  # sums below this are multiplied in one piece
_PIECE = 24  # bits of the lower of two pieces
_DECIMAL = Context(prec=40, rounding=ROUND_HALF_EVEN)


def to_integers(x: Tensor) -> Tensor:
    """Return the integers of ``x``, float64; numbers that are not fixed-point are rounded."""
    return (x.double() * 2.0**FRACTION_BITS).round_().clamp_(-MOST, MOST)


def from_integers(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fixed-point numbers of ``integers``, float64, saturated, in ``dtype``.

    A type smaller than float32 rounds them further, in the same way on every machine.
    """
    return integers.clamp(-MOST, MOST).mul_(2.0**-FRACTION_BITS).to(dtype)


def exp(logarithms: Tensor) -> list[Fraction]:
    """Return the exponential of each element, to 40 decimal digits, the same on every platform."""
    return [Fraction(_DECIMAL.exp(Decimal(value))) for value in logarithms.detach().flatten().tolist()]


class IntegerModule(nn.Module):
    """A module whose buffers hold integers and keep their type, whatever type the model is moved to."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(t: Tensor) -> Tensor:
            result: Tensor = fn(t)
            return result if result.dtype == t.dtype else t.to(result.device)

        return super()._apply(moved, recurse)


class Rescaling(IntegerModule):
    """Integers times a real factor plus a real bias per channel, rounded, by integer multiply, add and shift.

    Let m (below 2^24) and s be integers so that m / 2^s is next to the factor. The integer ``offset`` is the bias plus
    one half, for rounding, times 2^s::

        y = floor((x * m + offset) / 2^s)

    If x may exceed 2^27, that product would not fit, so x is split into two pieces, x = high * 2^24 + low::

        y = floor((high * m + floor(low * m / 2^24) + offset) / 2^(s - 24))

    Either way all numbers are below 2^53. m / 2^s is off by at most 2^-24 of the factor, or y by half a unit.

    Args:
        factors: one per channel, or one for all.
        biases: one per channel, in units of the result; None is 0. They saturate at 2^24 in magnitude.
        bound: the largest magnitude of x, below 2^48.
        trailing: the number of dimensions of x behind the channels.

    Raises:
        FmpqError: a factor is too large for an integer multiplier.
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
        # Without a bias the offset is only half a unit, which leaves more room than a bias of 24 bits.
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
    # This is round(factor * 2**shift), without the gcd that a product of fractions computes.
    multiplier, rest = divmod(factor.numerator << shift, factor.denominator)
    half = 2 * rest - factor.denominator
    return multiplier + (half > 0 or (half == 0 and multiplier % 2)), shift
