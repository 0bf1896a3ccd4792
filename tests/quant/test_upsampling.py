"""Transposed convolutions with few output channels, computed as convolutions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmpq_fx.quant import FastConvTranspose2d, quantize_layer
from fmpq_fx.quant import upsampling as module
from fmpq_fx.quant.upsampling import Upsampling

GEOMETRY = {"padding": 2, "output_padding": 1}


def last_layer(**options: Any) -> nn.ConvTranspose2d:
    torch.manual_seed(0)
    return nn.ConvTranspose2d(
        **{"in_channels": 16, "out_channels": 3, "kernel_size": 5, "stride": 2} | options
    )


def is_lowered(layer: nn.ConvTranspose2d) -> bool:
    return Upsampling(layer).together is not None


def test_the_last_layer_of_a_synthesis_transform_is_lowered_and_wide_ones_are_not() -> None:
    assert is_lowered(last_layer(**GEOMETRY))
    assert not is_lowered(last_layer(**GEOMETRY, out_channels=64))
    assert not is_lowered(last_layer(**GEOMETRY, in_channels=16, out_channels=4, groups=2))
    assert not is_lowered(last_layer(padding=2, stride=1))
    assert not is_lowered(last_layer(padding=2))  # one place more than the sub-positions fill
    assert not is_lowered(last_layer(**GEOMETRY, stride=(2, 4)))


@st.composite
def lowered(draw: Any) -> tuple[nn.ConvTranspose2d, Tensor]:
    """Draw a layer whose output is the stride times its input or a few strides more or less, and an input."""
    stride = draw(st.integers(2, 3))
    kernel, padding, dilation = (
        draw(st.tuples(st.integers(least, most), st.integers(least, most)))
        for least, most in ((1, 7), (0, 3), (1, 2))
    )
    extra = tuple(-(dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) % stride for i in (0, 1))
    inputs, outputs, bias = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, extra, bias=bias, dilation=dilation)
    return layer, torch.randn(2, inputs, *draw(st.tuples(st.integers(4, 9), st.integers(4, 9))))


@given(lowered(), st.sampled_from([torch.channels_last, torch.contiguous_format]))
@settings(max_examples=60, deadline=None)
def test_values_gradients_and_layout_are_those_of_torch(
    case: tuple[nn.ConvTranspose2d, Tensor], layout: torch.memory_format
) -> None:
    layer, x = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MOST_WORK", 1e9)  # whatever can be lowered
        fast = FastConvTranspose2d(layer)
    assert fast.upsampling.together is not None
    x = x.contiguous(memory_format=layout)
    (found, grads), (expected, expected_grads) = (with_gradients(m, layer, x) for m in (fast, layer))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.stride() == expected.stride() or min(found.shape) == 1
    for grad, of_torch in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, of_torch, rtol=1e-4, atol=1e-4)


def with_gradients(module: nn.Module, layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = x.clone().requires_grad_()
    out = module(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Return the shapes of the inputs that are convolved."""
    shapes: list[torch.Size] = []
    lower = module._lowered

    def noting(together: Any, bias: Any, x: Tensor, weight: Tensor) -> Tensor:
        shapes.append(x.shape)
        return lower(together, bias, x, weight)

    monkeypatch.setattr(module, "_lowered", noting)
    return shapes


def test_float_and_quantized_layers_are_lowered(runs: list[torch.Size]) -> None:
    x = torch.rand(2, 16, 6, 4)
    with torch.no_grad():
        FastConvTranspose2d(last_layer(**GEOMETRY))(x)
        quantize_layer(last_layer(**GEOMETRY), 8)(x)
    assert runs == [x.shape, x.shape]


def test_one_place_has_the_layout_of_the_input() -> None:
    with torch.no_grad():
        out = FastConvTranspose2d(last_layer(**GEOMETRY))(torch.rand(2, 16, 1, 1))
    assert out.is_contiguous()


def test_what_convolutions_are_slow_at_and_sizes_that_are_asked_for_are_left_to_torch(
    runs: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = last_layer(**GEOMETRY), torch.rand(2, 16, 6, 4)
    fast = FastConvTranspose2d(layer)
    with torch.no_grad():
        assert torch.equal(fast(x[0]), layer(x[0]))
        assert torch.equal(fast(x, output_size=[11, 8]), layer(x, output_size=[11, 8]))
        monkeypatch.setattr(module, "_ONEDNN", False)
        assert torch.equal(fast(x), layer(x))
        monkeypatch.undo()
        double = last_layer(**GEOMETRY).double()
        assert torch.equal(FastConvTranspose2d(double)(x.double()), double(x.double()))
    assert runs == []


def test_it_compiles_without_breaks() -> None:
    layer, x = quantize_layer(last_layer(**GEOMETRY), 8).eval(), torch.rand(2, 16, 6, 4)
    compiled = torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
