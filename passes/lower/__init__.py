"""Lower to integers: find the layers that choose the CDFs of a codec, and put exact layers in their places.

In comes a quantized graph or model; out comes the same model, whose entropy path computes in exact integers. It may
import ``passes`` and ``fmpq_fx.exact``.
"""
