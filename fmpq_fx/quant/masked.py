"""Recognize convolutions whose weight is masked: CompressAI's, and users' own, which are written in several ways.

A layer's own forward may be ``F.conv2d(x, self.weight * self.mask, ...)``, or ``self.weight.data *= self.mask`` and
then a convolution. Both are recognized by the outputs that they compute.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

_KNOWN: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def mask_name(layer: nn.Module) -> str | None:
    """Return the name of the buffer that the weight of ``layer`` is multiplied with; None if nothing masks it.

    A convolution that overrides forward is run once on random weights and inputs to find out.
    """
    if not isinstance(layer, nn.Conv2d):
        return None
    if type(layer).forward in (nn.Conv2d.forward, MaskedConv2d.forward):
        return "mask" if isinstance(layer, MaskedConv2d) else None
    if layer not in _KNOWN:
        names = (name for name, mask in layer.named_buffers(recurse=False) if mask.ndim == layer.weight.ndim)
        _KNOWN[layer] = next((name for name in names if _masks(layer, name)), None)
    return _KNOWN[layer]


def mask_of(layer: nn.Module) -> Tensor:
    """Return the mask of a ``layer`` that has one."""
    name = mask_name(layer)
    assert name is not None  # asked by the caller
    return layer.get_buffer(name)


@torch.no_grad()
def _masks(layer: nn.Conv2d, name: str) -> bool:
    """Say whether ``layer`` computes a convolution with its weight multiplied by the buffer ``name``."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(layer).cpu().float()
    mask = twin.get_buffer(name)
    weight = torch.rand(layer.weight.shape, generator=generator, device="cpu") + 0.5
    side = (
        max(dilation * kernel for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)) + 1
    )
    for sides in ((side, side), (side + 3, side + 1)):
        x = torch.rand(2, layer.in_channels, *sides, generator=generator, device="cpu")
        for training in (True, False):
            twin.weight.copy_(weight)
            try:
                found = twin.train(training)(x.clone())
                expected = twin._conv_forward(x, weight * mask, twin.bias)
            except Exception:  # the user's code may raise anything
                return False
            if not isinstance(found, Tensor) or not torch.equal(found, expected):
                return False
    return True
