"""Transposed convolutions as one convolution for each sub-position: the same numbers, whatever their geometry."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fmpq_fx.onnx.forms import in_form, note_arithmetic
from fmpq_fx.onnx.runtimes import OnnxRuntimeSession
from fmpq_fx.onnx.sub_positions import faster_together, kernels_of, surplus_of
from fmpq_fx.onnx.subpixel import SubpixelConvolutions, SubpixelProducts, obstacle_to_lowering
from fmpq_fx.passes.annotation import note_of
from fmpq_fx.quant import quantize_layer
from fmpq_fx.quant.layers import QuantizedConvTranspose2d

Pair = tuple[int, int]


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


def by_output(layer: nn.ConvTranspose2d) -> Tensor:
    """Return the weight, (out, in / groups, kH, kW)."""
    apart: Tensor = layer.weight.detach().unflatten(0, (layer.groups, -1))
    return apart.transpose(1, 2).flatten(0, 1)


@given(cases(), st.booleans())
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
        padded = F.pad(x, kernel.pads)
        parts.append(F.conv2d(padded, kernel.weight, bias, dilation=kernel.dilation, groups=layer.groups))
    surplus = [surplus_of(layer, axis) for axis in (0, 1)]
    assert all(0 <= places < stride for places in surplus)
    batch, channels, height, width = expected.shape
    whole = expected.new_full((batch, channels, height + surplus[0], width + surplus[1]), torch.nan)
    for sub, part in enumerate(torch.cat(parts, 1).split(channels, 1)):
        whole[:, :, sub // stride :: stride, sub % stride :: stride] = part
    torch.testing.assert_close(whole[:, :, :height, :width], expected, rtol=1e-5, atol=1e-5)


@given(cases())
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
    assert faster_together(nn.ConvTranspose2d(128, 3, 5, 2, 2, 1))
    assert not faster_together(nn.ConvTranspose2d(128, 64, 5, 2, 2, 1))
    assert faster_together(nn.ConvTranspose2d(128, 64, 2, 2))  # all see one tap: there are no zeros
    assert not faster_together(nn.ConvTranspose2d(128, 4, 5, 2, 2, 1, groups=2))


class Upsampling(nn.Module):
    """Calls one transposed convolution twice, one with an output size, and one with two strides."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.ConvTranspose2d(16, 16, 3, 2, 1, 1)
        self.sized = nn.ConvTranspose2d(16, 16, 3, 2, 1)
        self.wide = nn.ConvTranspose2d(16, 16, 3, (1, 2), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        return self.wide(self.sized(x, [24, 32]))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("form", "layer"), [("portable", SubpixelConvolutions), ("onnxruntime", SubpixelProducts)]
)
def test_what_cannot_be_lowered_stays_as_it_is_and_says_why(form: str, layer: type[nn.Module]) -> None:
    gm = fx.symbolic_trace(Upsampling())
    for name in ("twice", "sized", "wide"):
        quantized: Any = quantize_layer(gm.get_submodule(name), 8, 8)
        quantized.input_quantizer.freeze(-1.0, 1.0, False)
        gm.set_submodule(name, quantized)
    reasons = {"sized": "it is called with more than its input", "wide": "its strides differ"}
    twin, stored = in_form(note_arithmetic(gm, form), form)
    assert isinstance(twin.get_submodule("twice"), layer)
    assert obstacle_to_lowering(gm, "twice") is None
    for name, reason in reasons.items():
        assert isinstance(twin.get_submodule(name), QuantizedConvTranspose2d)
        notes = [note_of(node).arithmetic for node in gm.graph.nodes if node.target == name]
        assert [note is not None and (note.kind, note.why) for note in notes] == [("float32", reason)]
    assert set(stored) == {"twice", "sized", "wide"}
    assert isinstance(gm.get_submodule("twice"), QuantizedConvTranspose2d)  # the graph keeps its own


class Twice(nn.Module):
    """Calls a float and a quantized transposed convolution twice each, once without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ConvTranspose2d(16, 16, 5, 2, 2, 1, groups=2)
        self.quantized = nn.ConvTranspose2d(16, 16, 5, 2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized(self.plain(x))
        return self.quantized(self.plain(x[0]))[None]  # type: ignore[no-any-return]


def test_layers_that_are_called_twice_and_float_ones_compute_the_same() -> None:
    pytest.importorskip("onnxscript", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
    pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Twice().eval())
    gm.set_submodule("quantized", quantize_layer(gm.get_submodule("quantized"), 8, None))
    twin, _ = in_form(note_arithmetic(gm, "portable"), "portable")
    assert all(isinstance(twin.get_submodule(name), SubpixelConvolutions) for name in ("plain", "quantized"))
    x = torch.rand(2, 16, 3, 4)
    program = torch.onnx.export(twin, (x,), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    found = OnnxRuntimeSession(program.model_proto.SerializeToString(), 1)(x)
    torch.testing.assert_close(found, gm(x).detach(), rtol=1e-5, atol=1e-5)
