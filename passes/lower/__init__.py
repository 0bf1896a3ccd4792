"""Lowering to integers: finding what chooses the CDFs of a codec, and putting exact layers there.

In comes a quantized graph or model; out comes the same model, whose entropy path computes in exact integers. It may
import ``passes`` and ``fmpq_fx.exact``.
"""
