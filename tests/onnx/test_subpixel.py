"""Transposed convolutions as convolutions and a pixel shuffle: the same numbers, whatever their geometry."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.onnx.subpixel import subpixel
from fmpq_fx.passes.annotation import note_of
from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.leaves import NetworkTracer
from fmpq_fx.quant import quantize_layer, quantized_layers
from fmpq_fx.quant.layers import QuantizedConvTranspose2d
from support.small_models import small_model
from support.traced_models import PLAIN, lively

Pair = tuple[int, int]


def graph_of(layer: nn.Module) -> fx.GraphModule:
    root = nn.Sequential(layer)
    return fx.GraphModule(root, NetworkTracer().trace(root))


def transposed_calls(gm: fx.GraphModule) -> list[nn.Module]:
    modules = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    return [m for m in modules if isinstance(m, nn.ConvTranspose2d | QuantizedConvTranspose2d)]


def pairs(low: int, high: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw: Any) -> tuple[nn.ConvTranspose2d, Tensor]:
    """Draw a layer and an input on which torch itself can run it."""
    stride, groups = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.integers(1, 3))
    kernel, padding, dilation = draw(pairs(1, 7)), draw(pairs(0, 7)), draw(pairs(1, 3))
    limits = [max(stride, dilation[i]) - 1 for i in (0, 1)]
    output_padding = tuple(draw(st.integers(0, limit)) for limit in limits)
    inputs, outputs, size = (
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(pairs(1, 9)),
    )
    for i in (0, 1):
        extent = dilation[i] * (kernel[i] - 1) + 1
        assume((size[i] - 1) * stride - 2 * padding[i] + extent + output_padding[i] > 0)
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.ConvTranspose2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        output_padding,
        groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    return layer.eval(), torch.randn(2, inputs, *size)


@given(cases())
@settings(max_examples=80, deadline=None)
def test_a_float_layer_of_any_geometry(case: tuple[nn.ConvTranspose2d, Tensor]) -> None:
    layer, x = case
    lowered = subpixel(graph_of(layer))
    assert not transposed_calls(lowered)
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), layer(x), rtol=1e-5, atol=1e-5)


@given(cases(), st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_a_quantized_layer_keeps_its_integers_and_steps(
    case: tuple[nn.ConvTranspose2d, Tensor], bits: int
) -> None:
    float_layer, x = case
    layer = quantize_layer(float_layer, bits, 8).eval()
    quantizer: Any = layer.input_quantizer
    quantizer.freeze(min(x.min().item(), 0.0), max(x.max().item(), 0.0), integral=False)
    gm = graph_of(layer)
    lowered = subpixel(gm)
    convolution: Any = lowered.get_submodule("0")
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), gm(x), rtol=1e-5, atol=1e-5)
    outputs, places = float_layer.out_channels, float_layer.stride[0] ** 2
    before = layer.integers.flatten(1)
    after = convolution.integers.view(outputs, -1)
    for ours, theirs in zip(after, before, strict=True):
        values, counts = torch.unique(theirs[theirs != 0], return_counts=True)
        found, times = torch.unique(ours[ours != 0], return_counts=True)
        assert torch.equal(found, values)
        assert torch.equal(times, counts)
    steps = convolution.weight_quantizer.scale.view(outputs, places)
    torch.testing.assert_close(
        steps, layer.weight_quantizer.scale.view(-1, 1).expand_as(steps), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", ["factorized", "mean-scale hyperprior", "mbt2018"])
def test_float_models(name: str) -> None:
    gm = trace(lively(PLAIN[name]))
    lowered = subpixel(gm)
    assert transposed_calls(gm)
    assert not transposed_calls(lowered)
    x = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = lowered(x)["x_hat"], gm(x)["x_hat"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_rewritten_graph_is_left_as_it_was(x: Tensor) -> None:
    gm = fmpq_fx.prepare(small_model("bmshj2018-hyperprior"), 0.2, calibration=x, bits=[4, 8])
    kinds = {name: type(layer) for name, layer in quantized_layers(gm).items()}
    transposed = {name for name, kind in kinds.items() if kind is QuantizedConvTranspose2d}
    with torch.no_grad():
        expected = gm(x)["x_hat"]
        lowered = subpixel(gm)
        torch.testing.assert_close(lowered(x)["x_hat"], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(gm(x)["x_hat"], expected)
    assert {name: type(layer) for name, layer in quantized_layers(gm).items()} == kinds
    assert fmpq_fx.plan_of(gm).bits.keys() == quantized_layers(lowered).keys()
    notes = {node.target: note_of(node) for node in gm.graph.nodes if note_of(node).sites}
    assert all(note.subpixel is None for note in notes.values())
    found = {node.target: note_of(node) for node in lowered.graph.nodes if note_of(node).sites}
    assert {target for target, note in found.items() if note.subpixel} == transposed
    assert {target: replace(note, subpixel=None) for target, note in found.items()} == notes
    with pytest.raises(FmpqError, match="carries no plan"):  # it has other layers than the model's class
        fmpq_fx.convert(lowered)


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 2, 3, 2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.up(x))  # type: ignore[no-any-return]

    model = Twice()
    gm = fx.GraphModule(model, NetworkTracer().trace(model))
    lowered = subpixel(gm)
    x = torch.rand(1, 2, 3, 4)
    assert not transposed_calls(lowered)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_lowered_is_left_as_it_is() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 2, 3, 2, 1)
            self.wide = nn.ConvTranspose2d(2, 2, 3, (1, 2), 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.up(x, [6, 8]))  # type: ignore[no-any-return]

    model = Sized()
    lowered = subpixel(fx.GraphModule(model, NetworkTracer().trace(model)))
    assert len(transposed_calls(lowered)) == 2
    x = torch.rand(1, 2, 3, 4)
    assert torch.equal(lowered(x), model(x))
