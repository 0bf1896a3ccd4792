"""Transposed convolutions with few outputs, computed as convolutions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from fmpq_fx.quant import FastConvTranspose2d, is_faster_lowered, quantize_layer
from fmpq_fx.quant import upsampling as module
from support.upsamplings import upsamplings


def last_layer(**options: Any) -> nn.ConvTranspose2d:
    torch.manual_seed(0)
    return nn.ConvTranspose2d(
        **{"in_channels": 16, "out_channels": 3, "kernel_size": 5, "stride": 2} | options
    )


def test_the_last_layer_of_a_synthesis_transform_is_lowered_and_wide_ones_are_not() -> None:
    geometry = {"padding": 2, "output_padding": 1}
    assert is_faster_lowered(last_layer(**geometry))
    assert not is_faster_lowered(last_layer(**geometry, out_channels=64))
    assert not is_faster_lowered(last_layer(**geometry, out_channels=4, groups=2))
    assert not is_faster_lowered(last_layer(padding=2, stride=1))
    assert not is_faster_lowered(last_layer(padding=2))  # one place more than the sub-positions fill
    assert not is_faster_lowered(last_layer(**geometry, stride=(2, 4)))


@given(upsamplings())
@settings(max_examples=60, deadline=None)
def test_any_geometry_has_the_values_gradients_and_shape_of_torch(
    case: tuple[nn.ConvTranspose2d, Tensor],
) -> None:
    layer, x = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_WORK", 1e9)  # whatever can be lowered
        found, grads = forward_and_gradients(FastConvTranspose2d(layer), layer, x)
    expected, expected_grads = forward_and_gradients(layer, layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, of_torch in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, of_torch, rtol=1e-4, atol=1e-4)


def forward_and_gradients(
    module: nn.Module, layer: nn.ConvTranspose2d, x: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = x.clone().requires_grad_()
    out = module(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_output_has_the_layout_of_the_input(layout: torch.memory_format) -> None:
    layer = quantize_layer(last_layer(padding=2, output_padding=1), 8)
    x = torch.rand(2, 16, 6, 4).contiguous(memory_format=layout)
    with torch.no_grad():
        assert layer(x).is_contiguous(memory_format=layout)


def test_what_convolutions_are_slow_at_and_sizes_that_are_asked_for_are_left_to_torch() -> None:
    layer = last_layer(padding=2, output_padding=1)
    fast, x = FastConvTranspose2d(layer), torch.rand(2, 16, 6, 4)
    with torch.no_grad():
        assert torch.equal(fast(x[0]), layer(x[0]))
        assert torch.equal(fast(x, output_size=[11, 8]), layer(x, output_size=[11, 8]))
        double = last_layer(padding=2, output_padding=1).double()
        assert torch.equal(FastConvTranspose2d(double)(x.double()), double(x.double()))
