"""Transposed convolutions as convolutions for the sub-positions of their outputs, whatever their geometry."""

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmpq_fx.quant.sub_positions import convolve, kernels_of, surplus_of, work_together
from support.upsamplings import upsamplings


def by_output(layer: nn.ConvTranspose2d) -> Tensor:
    """Return the weight, (out, in / groups, kH, kW)."""
    apart: Tensor = layer.weight.detach().unflatten(0, (layer.groups, -1))
    return apart.transpose(1, 2).flatten(0, 1)


@given(upsamplings(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_sub_positions_of_any_geometry(case: tuple[nn.ConvTranspose2d, Tensor], together: bool) -> None:
    layer, x = case
    assume(layer.groups == 1 or not together)
    stride = layer.stride[0]
    with torch.no_grad():
        expected = layer(x)
    parts = []
    for kernel in kernels_of(by_output(layer), layer, together):
        copies = kernel.weight.size(0) // layer.out_channels
        bias = None if layer.bias is None else layer.bias.detach().repeat(copies)
        parts.append(convolve(x, kernel.weight, bias, kernel.pads, kernel.dilation, layer.groups))
    surplus = [surplus_of(layer, axis) for axis in (0, 1)]
    assert all(0 <= places < stride for places in surplus)
    batch, channels, height, width = expected.shape
    whole = expected.new_full((batch, channels, height + surplus[0], width + surplus[1]), torch.nan)
    for sub, part in enumerate(torch.cat(parts, 1).split(channels, 1)):
        whole[:, :, sub // stride :: stride, sub % stride :: stride] = part
    torch.testing.assert_close(whole[:, :, :height, :width], expected, rtol=1e-5, atol=1e-5)


@given(upsamplings())
@settings(max_examples=40, deadline=None)
def test_sub_positions_apart_multiply_no_zeros_if_they_see_anything(
    case: tuple[nn.ConvTranspose2d, Tensor],
) -> None:
    layer, _ = case
    weight = torch.ones_like(by_output(layer))
    seen = [kernel.weight for kernel in kernels_of(weight, layer, False) if kernel.weight.any()]
    assert all(kernel.all() for kernel in seen)
    assert sum(kernel.numel() for kernel in seen) == weight.numel()


def test_few_channels_are_computed_together() -> None:
    # 3 channels take a block of 16 in each of four convolutions, but 12 take one altogether.
    assert work_together(nn.ConvTranspose2d(128, 3, 5, 2, 2, 1)) == 9 / 25
    assert work_together(nn.ConvTranspose2d(128, 64, 5, 2, 2, 1)) == 36 / 25
    assert work_together(nn.ConvTranspose2d(128, 64, 2, 2)) == 1  # all see one tap: there are no zeros
    assert work_together(nn.ConvTranspose2d(128, 4, 5, 2, 2, 1, groups=2)) == math.inf
