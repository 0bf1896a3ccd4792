"""Round to integers in a range and back, with gradients for the rounded tensor, the step and the zero point.

Forward computes exactly what integer inference computes: the dequantized value of an integer in a fixed range.
Backward lets gradients through the rounding (straight-through) and, with a small slope, through the clip.
"""

from typing import Any

import torch
from torch import Tensor

LEAK = 0.05
"""Default slope of the leaky clip outside the range."""


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the least and the largest integer of ``bits``: symmetric about 0 if ``signed``, or from 0 up."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return (-high if signed else 0), high


class _FakeQuantize(torch.autograd.Function):
    """``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``, element by element.

    The gradients are those of the leaky clip without rounding. Inside the range:

    - x: 1 (straight-through rounding);
    - scale: y / scale - x / scale, the rounding error in steps (LSQ: Esser et al. 2020, eq. 3);
    - zero_point: 0.

    Outside it, where y / scale is the end of the range in steps:

    - x: ``leak``;
    - scale: (1 - leak) * y / scale;
    - zero_point: -(1 - leak) * scale (LSQ+: Bhalgat et al. 2020, with a leak).

    The gradients of scale and zero_point are multiplied by ``grad_scale``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        low: int,
        high: int,
        leak: float,
        grad_scale: float,
    ) -> Tensor:
        integers = _integers(x, scale, zero_point)
        clamped = integers.clamp(low, high)
        inside = clamped == integers
        y = clamped.sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, scale, y, inside)
        ctx.leak, ctx.grad_scale = leak, grad_scale
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, scale, y, inside = ctx.saved_tensors
        grad_inside = grad * inside
        grad_outside = grad - grad_inside
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            rounding = (y - x).mul_(grad_inside).sum_to_size(scale.shape)
            ends = (y * grad_outside).sum_to_size(scale.shape) * (1 - ctx.leak)
            grad_scale = (rounding + ends) / scale * ctx.grad_scale
        if ctx.needs_input_grad[2]:
            grad_zero = grad_outside.sum_to_size(scale.shape) * scale * (ctx.leak - 1) * ctx.grad_scale
        grad_x = torch.add(grad_inside, grad_outside, alpha=ctx.leak)
        return grad_x, grad_scale, grad_zero, None, None, None, None


def _integers(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the integers of ``x``, not clipped, as a new tensor in the wider type of ``x`` and ``scale``."""
    # In place where possible, here and below: with large activations, memory takes the time, not arithmetic.
    return (x / scale).round_().add_(zero_point)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, leak: float, grad_scale: float
) -> Tensor:
    """Apply :class:`_FakeQuantize`; if no gradient is needed, nothing is saved for it."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, scale, zero_point)):
        return _FakeQuantize.apply(  # type: ignore[no-any-return]
            x, scale, zero_point, low, high, leak, grad_scale
        )
    clamped = _integers(x, scale, zero_point).clamp_(low, high)
    return clamped.sub_(zero_point).mul_(scale).to(x.dtype)


class _ToInteger(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: int, high: int) -> Tensor:
        return torch.round(x).clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def to_integer(x: Tensor, low: int, high: int) -> Tensor:
    """Return ``x`` rounded to an integer in [low, high]; the gradient is 1 everywhere, also at the ends."""
    rounded: Tensor = _ToInteger.apply(x, low, high)
    return rounded
