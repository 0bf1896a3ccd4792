"""Quantized layers: a float layer with fake quantization of its weight and of its input.

The float layer stays inside, with its trained weight and bias, so that fine-tuning can train it and its weight can be
quantized anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from compressai.layers import GDN, GDN1
from torch import Tensor, nn

from fmpq_fx.quant.calls import CalledAlike
from fmpq_fx.quant.fake_quant import ActivationFakeQuant, WeightFakeQuant
from fmpq_fx.quant.masked import mask_of
from fmpq_fx.quant.rounding import LEAK
from fmpq_fx.quant.upsampling import Upsampling

QUANTIZERS = ("weight_quantizer.", "input_quantizer.")
"""Prefixes of the quantizers' tensors in the state dict of a :class:`QuantizedLayer`."""


class QuantizedLayer(CalledAlike):
    """A layer whose weight is fake-quantized, and so is its input if ``activation_bits`` is given.

    Args:
        layer: the float layer; it becomes a part of this one.
        bits: bits of the weights, at least 2.
        activation_bits: bits of the input, at least 2, or None to keep it float.
        clip: see :class:`WeightFakeQuant`.
        leak: slope of gradients outside the ranges of weights and input.
        fitted: see :class:`WeightFakeQuant`.
    """

    signed = True
    weight_name = "weight"  # the float layer's parameter that is quantized
    float_names: tuple[str, ...] = ("bias",)  # parameters of the float layer that are not quantized
    channel_dim = -3  # the channels' dimension of the input
    power = 1  # the power of the input that the weight multiplies
    # The shape in which a number per input channel broadcasts against the weight; None: it cannot.
    spread_over: tuple[int, ...] | None = None

    def __init__(
        self,
        layer: nn.Module,
        bits: int,
        activation_bits: int | None = None,
        *,
        clip: float = 1.0,
        leak: float = LEAK,
        fitted: bool = True,
    ):
        super().__init__(layer)
        self.layer = layer
        self.kept_weight: Tensor | None = None  # see weights_kept
        weight = self.float_weight().detach()
        self.weight_quantizer = WeightFakeQuant(
            weight, bits, self.shared_dims(weight), signed=self.signed, clip=clip, leak=leak, fitted=fitted
        )
        self.input_quantizer = (
            None
            if activation_bits is None
            else ActivationFakeQuant(activation_bits, weight, channel_dim=self.channel_dim, leak=leak)
        )

    @property
    def bits(self) -> int:
        """Bits of the weights."""
        return self.weight_quantizer.bits

    @staticmethod
    def weight_of(layer: nn.Module) -> Tensor:
        """Return the weight that the float ``layer`` multiplies with, computed from its parameters."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight

    def float_weight(self) -> Tensor:
        """Return the float layer's weight, in the shape in which its steps broadcast."""
        return self.weight_of(self.layer)

    @property
    def weight(self) -> Tensor:
        """The weight that this layer multiplies with: dequantized, in the shape of the float layer's weight."""
        return self.dequantized_weight() if self.kept_weight is None else self.kept_weight

    def dequantized_weight(self) -> Tensor:
        """Return the float weight quantized and dequantized, in the shape of the float layer's weight."""
        weight: Tensor = self.weight_quantizer(self.float_weight())
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The float bias, for a forward that reads it without calling the layer."""
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return bias

    def shared_dims(self, weight: Tensor) -> tuple[int, ...]:
        """Return the dimensions that share a step: all but the output channels, which come first."""
        return tuple(range(1, weight.ndim))

    @property
    def integers(self) -> Tensor:
        """The integers of the weight, int32, (out, in, places); the places of a kernel are one dimension."""
        return self.by_output(self.weight_quantizer.integers(self.float_weight()))

    @property
    def layout(self) -> tuple[int, ...]:
        """The shape of :attr:`integers`."""
        return tuple(self.by_output(torch.empty(self.float_weight().shape, device="meta")).shape)

    def by_output(self, values: Tensor) -> Tensor:
        """Return ``values``, of the shape of :meth:`float_weight`, as (out, in, places)."""
        return values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)

    @torch.no_grad()
    def set_integers(self, integers: Tensor) -> None:
        """Set the float layer's weight to the dequantized ``integers``, of the shape of :attr:`integers`."""
        weight = integers.view(self.float_weight().shape) * self.weight_quantizer.scale
        self.set_weight(weight)

    @torch.no_grad()
    def set_clip(self, clip: float) -> None:
        """Clip the weight at the fraction ``clip`` of each channel's largest magnitude; 1 is min-max."""
        self.weight_quantizer.fit(self.float_weight(), clip)
        if self.kept_weight is not None:
            self.kept_weight = self.dequantized_weight()

    def spread_shape(self) -> tuple[int, ...] | None:
        """Return :attr:`spread_over`, or None if the input cannot have a step per channel (with groups, it cannot)."""
        return self.spread_over if getattr(self.layer, "groups", 1) == 1 else None

    def set_spread(self, log_spread: Sequence[float], *, fitted: bool = True) -> None:
        """Give the input's step these logarithms of factors, one per channel; none, and all channels have one step.

        With ``fitted`` the steps of the weights are fitted anew. The layer must have a :meth:`spread_shape`.
        """
        quantizer = self.weight_quantizer
        values = quantizer.log_scale.detach().new_tensor(log_spread) if log_spread else None
        quantizer.fold(values, self.spread_shape() or ())
        if fitted:
            self.set_clip(quantizer.clip)

    def set_weight(self, weight: Tensor) -> None:
        """Set the float layer's weight to ``weight``, of the shape of :attr:`weight`."""
        self.layer.get_parameter(self.weight_name).copy_(self.parameter_of(weight))

    def parameter_of(self, weight: Tensor) -> Tensor:
        """Return the value that the parameter :attr:`weight_name` must have for the float layer's weight ``weight``."""
        return weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid of the input quantizer, or ``x`` itself if activations stay float."""
        if self.input_quantizer is None:
            return x
        spread = self.weight_quantizer.log_spread
        quantized: Tensor = self.input_quantizer(
            x, None if spread is None else spread.view(-1, *[1] * (-self.channel_dim - 1))
        )
        return quantized

    def __repr__(self) -> str:
        """Return one line, readable in the print of a whole graph."""
        quantizer = self.input_quantizer
        activations = "float" if quantizer is None else f"{quantizer.bits}-bit"
        layer = f"{type(self.layer).__name__}({self.layer.extra_repr()})"
        return f"{type(self).__name__}({layer}, weight={self.bits}-bit, input={activations})"


class QuantizedConv2d(QuantizedLayer):
    """A convolution with one weight step per output channel, dimension 0 of its weight."""

    layer: nn.Conv2d
    spread_over = (1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (B, C, H, W)."""
        out: Tensor = self.layer._conv_forward(self.quantized_input(x), self.weight, self.layer.bias)
        return out


class QuantizedMaskedConv2d(QuantizedConv2d):
    """A convolution that sees only decoded symbols; masked weights are zero and stay so."""

    @staticmethod
    def weight_of(layer: nn.Module) -> Tensor:
        """Return the masked float weight."""
        weight: Tensor = layer.weight * mask_of(layer)  # type: ignore[operator]
        return weight

    @property
    def mask(self) -> Tensor:
        """The mask: CompressAI's coding loops read it, and :attr:`weight`, without calling the layer."""
        return mask_of(self.layer)


class QuantizedConvTranspose2d(QuantizedLayer):
    """A transposed convolution: its weight is (in, out / groups, kH, kW), so output channels are dimension 1.

    With groups, output channel g * (out / groups) + j has its weights in the rows of group g. So a step must not span
    groups: the weight is viewed as (groups, in / groups, out / groups, kH, kW).
    """

    layer: nn.ConvTranspose2d
    spread_over = (1, -1, 1, 1, 1)  # groups are a dimension

    def __init__(self, layer: nn.Module, *args: Any, **options: Any):
        super().__init__(layer, *args, **options)
        self.upsampling = Upsampling(self.layer)

    def float_weight(self) -> Tensor:
        """Return the weight with a dimension for its groups, (groups, in / groups, out / groups, kH, kW)."""
        weight: Tensor = self.weight_of(self.layer).unflatten(0, (self.layer.groups, -1))
        return weight

    def dequantized_weight(self) -> Tensor:
        """Return the dequantized weight, (in, out / groups, kH, kW)."""
        return super().dequantized_weight().flatten(0, 1)

    def shared_dims(self, weight: Tensor) -> tuple[int, ...]:
        """Return all dimensions but the group and the output channel in it."""
        return (1, 3, 4)

    def by_output(self, values: Tensor) -> Tensor:
        """Return ``values``, of the shape of :meth:`float_weight`, as (out, in, places), the outputs group by group."""
        return values.transpose(1, 2).flatten(0, 1).flatten(2)

    @torch.no_grad()
    def set_integers(self, integers: Tensor) -> None:
        """Set the float layer's weight to the dequantized ``integers``, of the shape of :attr:`integers`."""
        groups, inputs, outputs, *kernel = self.float_weight().shape
        apart = integers.view(groups, outputs, inputs, *kernel).transpose(1, 2)
        self.set_weight((apart * self.weight_quantizer.scale).flatten(0, 1))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Upsample ``x`` (B, C, H, W), to ``output_size`` (height, width) if given."""
        return self.upsampling(self.layer, self.quantized_input(x), self.weight, output_size)


class QuantizedLinear(QuantizedLayer):
    """A linear layer with one weight step per output feature."""

    layer: nn.Linear
    channel_dim = -1
    spread_over = (1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension of ``x`` (…, in)."""
        return F.linear(self.quantized_input(x), self.weight, self.layer.bias)


class QuantizedGDN(QuantizedLayer):
    """GDN with a quantized gamma: the gamma after its reparametrization, which multiplies; unsigned.

    The input is quantized in the norm, where gamma multiplies it. The input that the norm divides stays float: no
    weight multiplies it, and rounding it would cost as much RD loss as rounding a convolution's input.
    """

    layer: GDN
    signed = False
    power = 2
    weight_name = "gamma"
    float_names = ("beta",)

    @staticmethod
    def weight_of(layer: nn.Module) -> Tensor:
        """Return gamma after its reparametrization, (C, C), not negative."""
        gamma: Tensor = layer.gamma_reparam(layer.gamma)  # type: ignore[operator]
        return gamma

    def parameter_of(self, weight: Tensor) -> Tensor:
        """Return gamma before its reparametrization, up to rounding errors of float32."""
        before: Tensor = self.layer.gamma_reparam.init(weight)
        return before

    def _norm(self, powers: Tensor) -> Tensor:
        channels = powers.size(1)
        beta = self.layer.beta_reparam(self.layer.beta)
        return F.conv2d(powers, self.weight.reshape(channels, channels, 1, 1), beta)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (B, C, H, W): x / sqrt(beta + gamma * x^2), or the inverse (Ballé et al. 2016)."""
        norm = self._norm(self.quantized_input(x) ** 2)
        if norm.requires_grad:
            return x * (norm.sqrt() if self.layer.inverse else norm.rsqrt())
        return x * (norm.sqrt_() if self.layer.inverse else norm.rsqrt_())


class QuantizedGDN1(QuantizedGDN):
    """GDN1 with a quantized gamma: x / (beta + gamma * |x|), or the inverse (Johnston et al. 2019)."""

    layer: GDN1
    power = 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (B, C, H, W)."""
        norm = self._norm(self.quantized_input(x).abs())
        return x * (norm if self.layer.inverse else 1.0 / norm)
