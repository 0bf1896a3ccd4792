"""Fake quantization of weights and activations: modules that round, and learn their steps."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fmpq_fx.quant.rounding import LEAK, fake_quantize, integer_range, to_integer


class _Quantizer(nn.Module):
    """Keeps its parameters in float32 or wider, whatever dtype the model is moved to.

    ``half()`` would change a step by per cents, since its logarithm is kept, and ``bfloat16()`` cannot hold a zero
    point above 256. The tensors that it quantizes may have any dtype.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(t: Tensor) -> Tensor:
            result: Tensor = fn(t)
            wide = result.dtype.itemsize >= torch.float32.itemsize
            return result if wide else t.to(result.device)

        return super()._apply(moved, recurse)


class WeightFakeQuant(_Quantizer):
    """Uniform symmetric fake quantization of a weight tensor, one learned step per output channel.

    Integers lie in [-(2^(bits-1) - 1), 2^(bits-1) - 1], or in [0, 2^bits - 1] with ``signed=False``. The steps
    are kept as their logarithms, (channels,), so that they stay positive whatever the optimizer does.

    Where the layer's input has a step per channel, its spread r is folded in. Integers of weights multiply integers of
    the input. With the input's step s * r_c, the weight of output o and input c gets the step t_o / r_c::

        sum_c (W_oc t_o / r_c) (X_c s r_c)  =  t_o s  sum_c W_oc X_c

    Args:
        weight: the tensor to quantize; it sets the first steps, so that the largest magnitude of each channel
            is the last integer (min-max).
        bits: at least 2.
        dims: the dimensions of ``weight`` that share a step, i.e. all but those of the output channel.
        signed: False for tensors that are never negative (GDN's gamma).
        clip: fraction of each channel's largest magnitude that is kept; 1 is min-max, less clips outliers.
        leak: slope of the gradient outside the range.
        fitted: False leaves the steps at 1, to be loaded later.
    """

    log_scale: nn.Parameter
    log_spread: nn.Parameter | None  # the logarithm of r, (input channels,)
    zero_point: Tensor  # 0

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        dims: tuple[int, ...],
        *,
        signed: bool = True,
        clip: float = 1.0,
        leak: float = LEAK,
        fitted: bool = True,
    ):
        super().__init__()
        self.bits = bits
        self.low, self.high = integer_range(bits, signed)
        self.leak, self.dims, self.clip = leak, dims, clip
        self.register_parameter("log_spread", None)
        self.spread_shape: tuple[int, ...] = ()  # the shape in which the spread broadcasts against the weight
        self.broadcast = tuple(1 if dim in dims else size for dim, size in enumerate(weight.shape))
        steps, dtype = math.prod(self.broadcast), torch.promote_types(weight.dtype, torch.float32)
        self.log_scale = nn.Parameter(weight.new_zeros(steps, dtype=dtype))
        # LSQ's gradient scale, per channel: the elements that share a step are those of one channel.
        self.grad_scale = 1 / math.sqrt(weight.numel() / steps * self.high)
        self.register_buffer("zero_point", weight.new_zeros(1, dtype=dtype), persistent=False)
        if fitted:
            self.fit(weight, clip)

    @torch.no_grad()
    def fit(self, weight: Tensor, clip: float = 1.0) -> None:
        """Set the steps as for a quantizer that is made with ``weight`` and ``clip``."""
        self.clip = clip
        self.log_scale.copy_(self._fitted(weight).log().flatten())

    def fold(self, log_spread: Tensor | None, shape: tuple[int, ...]) -> None:
        """Fold the spread of the input in, (input channels,), or take it out (None).

        In ``shape`` the spread broadcasts against the weight. The caller must fit the steps anew.
        """
        self.log_spread, self.spread_shape = None if log_spread is None else nn.Parameter(log_spread), shape

    def _fitted(self, weight: Tensor) -> Tensor:
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if self.log_spread is not None:
            weight = weight * self.log_spread.detach().exp().view(self.spread_shape)
        peak = weight.abs()
        if self.dims[-1] - self.dims[0] >= len(self.dims):
            # A dimension that is kept lies between. In one call, torch would take 40 times as long.
            peak = peak.amax(self.dims[0], keepdim=True)
        peak = peak.amax(self.dims, keepdim=True) * self.clip
        # Any step represents a channel of zeros; 1 keeps the logarithm finite.
        return torch.where(peak > 0, peak / self.high, torch.ones_like(peak))

    @property
    def scale(self) -> Tensor:
        """The steps, in a shape that broadcasts against the weight."""
        if self.log_spread is None:
            return self.output_scale
        return self.output_scale / self.log_spread.exp().view(self.spread_shape)

    @property
    def output_scale(self) -> Tensor:
        """The steps without the spread of the input, one for each output channel."""
        return self.log_scale.exp().view(self.broadcast)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight`` rounded to its grid and dequantized, of the same shape."""
        return fake_quantize(
            weight, self.scale, self.zero_point, self.low, self.high, self.leak, self.grad_scale
        )

    def integers(self, weight: Tensor) -> Tensor:
        """Return the integers of ``weight``, int32, of the same shape."""
        return torch.round(weight / self.scale).clamp(self.low, self.high).to(torch.int32)

    def extra_repr(self) -> str:
        """Return the bits and the range of integers."""
        return f"bits={self.bits}, integers={self.low} … {self.high}"


class ActivationFakeQuant(_Quantizer):
    """Uniform affine fake quantization of a layer's input, with a learned step and zero point.

    It starts as an observer, which returns its input unchanged and keeps the range of each channel. :meth:`freeze`
    turns it into a fake-quantizer with integers in [0, 2^bits - 1]. The range always contains 0, so that the zeros of
    a padded convolution are represented exactly.

    There is one step for the whole tensor. It may be multiplied by a spread per channel, which the layer folds into its
    weights (see :class:`WeightFakeQuant`) and passes to :meth:`forward`.

    If every value seen was a whole number and the range fits, the step is fixed at 1, the only step with which rounded
    latents pass unchanged. In training mode latents carry noise instead of rounding. Then they pass as they are:
    rounding them too would double the error.

    Step and zero point are parameters where they can be trained. Where the step is fixed, they are buffers of the same
    names, since a training loop trains every parameter that it finds.
    """

    log_scale: Tensor  # (1,)
    zero_point: Tensor  # (1,)

    def __init__(self, bits: int, like: Tensor, *, channel_dim: int = -3, leak: float = LEAK):
        super().__init__()
        self.set_bits(bits)
        self.channel_dim, self.leak = channel_dim, leak
        self.observe()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.log_scale = nn.Parameter(like.new_zeros(1, dtype=dtype))
        self.zero_point = nn.Parameter(like.new_zeros(1, dtype=dtype))

    def forward(self, x: Tensor, log_spread: Tensor | None = None) -> Tensor:
        """Return ``x`` itself while observing, else ``x`` on the grid, of the same shape.

        Args:
            x: the input.
            log_spread: logarithms of the channels' factors, in a shape that broadcasts against ``x``; None is one step
                for all.
        """
        if self.observing:
            self._widen(x.detach())
            return x
        if self.training and self.whole:
            return x
        scale = (self.log_scale if log_spread is None else self.log_scale + log_spread).exp()
        # LSQ's gradient scale, by the elements of one sample that share a step.
        grad_scale = 1 / math.sqrt(max(1, x[:1].numel() // scale.numel()) * self.high)
        zero_point = to_integer(self.zero_point, 0, self.high)
        return fake_quantize(x, scale, zero_point, 0, self.high, self.leak, grad_scale)

    def set_bits(self, bits: int) -> None:
        """Set the bits of the integers; the next :meth:`freeze` fits the step to them."""
        self.bits, self.high = bits, 2**bits - 1

    def observe(self) -> None:
        """Forget the range; from now on, observe the input and do not quantize it."""
        self.observing = True
        self.integral = True  # until a value is seen that is no whole number
        self.range = (0.0, 0.0)
        self.seen: tuple[Tensor, Tensor] | None = None  # the least and the largest value of each channel

    def _widen(self, x: Tensor) -> None:
        x = x[None] if x.ndim == -self.channel_dim else x  # a single input
        others = [dim for dim in range(x.ndim) if dim != x.ndim + self.channel_dim]
        # A NaN is kept, so that calibration reports it.
        low, high = x.amin(others).clamp(max=0), x.amax(others).clamp(min=0)
        if self.seen is not None:
            low, high = torch.minimum(low, self.seen[0]), torch.maximum(high, self.seen[1])
        self.seen = low, high
        self.range = low.min().item(), high.max().item()
        self.integral = self.integral and bool(torch.equal(x, x.round()))

    @property
    def whole(self) -> bool:
        """Whether the step is fixed at 1, because the input is whole numbers."""
        low, high = self.range
        return not self.observing and self.integral and high - low <= self.high

    def freeze(self, low: float, high: float, integral: bool) -> None:
        """Quantize from now on, with steps that cover ``low`` … ``high`` (which contains 0).

        If the input has a step per channel, ``low`` and ``high`` are of the channels divided by their spread.
        """
        self.observing, self.range, self.integral, self.seen = False, (low, high), integral, None
        scale = 1.0 if self.whole or high == low else (high - low) / self.high
        for name, number in {"log_scale": math.log(scale), "zero_point": float(round(-low / scale))}.items():
            value = torch.full_like(getattr(self, name).detach(), number)
            delattr(self, name)
            if self.whole:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def extra_repr(self) -> str:
        """Return the bits, the state and the range."""
        state = "observing" if self.observing else "quantizing"
        return f"bits={self.bits}, {state}, range={self.range[0]:.4g} … {self.range[1]:.4g}"
