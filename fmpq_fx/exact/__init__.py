"""Exact integer arithmetic: layers that compute the same bits on every machine.

In comes a quantized layer; out comes one that computes with fixed-point numbers, whose sums are the same in any order.
It knows no graph. It may import ``quant``.
"""

from fmpq_fx.exact.layers import ExactLayer, ExactLeakyReLU

__all__ = ["ExactLayer", "ExactLeakyReLU"]
