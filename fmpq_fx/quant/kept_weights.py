"""Quantize weights once for many forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fmpq_fx.quant.layers import QuantizedLayer


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within the block, the quantized layers in ``model`` quantize their weights once, not in every forward.

    It is for evaluation: no gradient reaches the weights, and nothing may change them meanwhile.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    before = [layer.kept_weight for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.kept_weight = layer.weight.detach()
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.kept_weight = weight
