"""Quantized layers and the fake quantization that they are made of. In comes a float layer, out comes a quantized one.

It knows no graph.
"""

from fmpq_fx.quant.calls import CalledAlike, argument_names, in_order
from fmpq_fx.quant.fake_quant import ActivationFakeQuant, WeightFakeQuant
from fmpq_fx.quant.kept_weights import weights_kept
from fmpq_fx.quant.latents import QuantizeLatent
from fmpq_fx.quant.layers import QUANTIZERS, QuantizedLayer
from fmpq_fx.quant.registry import quantize_layer, quantized_class, quantized_layers
from fmpq_fx.quant.rounding import integer_range
from fmpq_fx.quant.upsampling import FastConvTranspose2d

__all__ = [
    "QUANTIZERS",
    "ActivationFakeQuant",
    "CalledAlike",
    "FastConvTranspose2d",
    "QuantizeLatent",
    "QuantizedLayer",
    "WeightFakeQuant",
    "argument_names",
    "in_order",
    "integer_range",
    "quantize_layer",
    "quantized_class",
    "quantized_layers",
    "weights_kept",
]
