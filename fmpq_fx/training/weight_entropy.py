"""The coded size of quantized weights as a differentiable function, so that training can lower it.

It approximates the bytes of :mod:`fmpq_fx.storage.weight_coder`: integers have discretized logistic distributions,
whose widths are products of factors of output channel, input channel and place in the kernel. Classes, tables of
counted frequencies and side information are left out.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fmpq_fx.quant import QuantizedLayer
from fmpq_fx.storage.weight_coder import MODELED_BITS

_RAREST = 2.0**-17
"""The least probability of an integer; the coder takes no more bits for a rarer one."""


def weight_cr(layers: Iterable[QuantizedLayer]) -> Tensor:
    """Return the estimated coded bytes of the weights of ``layers`` / their float32 bytes, a float64 scalar.

    At least one layer is needed. Gradients reach the float weights and their steps.
    """
    layers = tuple(layers)
    bits = torch.stack([weight_bits(layer) for layer in layers]).sum()
    return bits / (32 * sum(layer.float_weight().numel() for layer in layers))


def weight_bits(layer: QuantizedLayer) -> Tensor:
    """Return the estimated bits of the integer weights of ``layer``, a float64 scalar.

    Rounding is straight-through: the gradient of a weight is that of its integer. The gradient of a step has LSQ's
    scale, as in the RD loss, so that the two can be weighed. Widths follow the weights and have no gradient. Clipped
    weights take the same bits wherever they lie.
    """
    quantizer = layer.weight_quantizer
    scale = quantizer.scale
    scale = scale.detach() + (scale - scale.detach()) * quantizer.grad_scale
    exact = layer.by_output(layer.float_weight() / scale).clamp(quantizer.low, quantizer.high)
    integers = exact + (exact.round() - exact).detach()
    # The lowest bits, which the coder does not model.
    raw = max(0, (quantizer.high - quantizer.low).bit_length() - MODELED_BITS)
    size: Tensor = integers.abs() / 2**raw
    width = _widths(size.detach())
    probability = torch.sigmoid((0.5 - size) / width) - torch.sigmoid((-0.5 - size) / width)
    if not layer.signed:  # only half of the distribution is used: twice the probability, except at 0
        probability = probability * torch.where(size.detach() > 0, 2.0, 1.0)
    modeled = -(probability + _RAREST).log2().sum(dtype=torch.float64)
    return modeled + raw * size.numel()


def _widths(size: Tensor) -> Tensor:
    """Return the scale of the logistic distribution of every integer, from the magnitudes (out, in, places).

    The factors fit the mean magnitude of each channel and place. A logistic distribution of scale s has the mean
    magnitude 2 log(2) s; rounded to integers, about log(2) / sinh(1 / (2 s)).
    """
    spread = size + 0.05 * size.mean() + 1e-6
    outputs, inputs, places = (spread.mean(others, keepdim=True) for others in ((1, 2), (0, 2), (0, 1)))
    mean = outputs * inputs * places / spread.mean().square()
    width: Tensor = 0.5 / torch.asinh(math.log(2) / mean)
    return width
