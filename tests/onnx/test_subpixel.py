"""Transposed convolutions in the exported forms."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fmpq_fx.onnx.forms import in_form, note_arithmetic
from fmpq_fx.onnx.runtimes import OnnxRuntimeSession
from fmpq_fx.onnx.subpixel import SubpixelConvolutions, SubpixelProducts, obstacle_to_lowering
from fmpq_fx.passes.annotation import note_of
from fmpq_fx.quant import quantize_layer
from fmpq_fx.quant.layers import QuantizedConvTranspose2d


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
