"""Integer convolutions in ONNX compute what the quantized layers compute, whatever their geometry."""

from typing import Any

import pytest
import torch
from torch import nn

from fmpq_fx.quant import quantize_layer
from fmpq_fx.quant.layers import QuantizedConv2d, QuantizedConvTranspose2d, QuantizedGDN

pytest.importorskip("onnx", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from compressai.layers import GDN

from support.onnx_layers import in_onnx


def quantized(layer: nn.Conv2d, bits: int, activation_bits: int = 8, low: float = -0.7) -> QuantizedConv2d:
    made: QuantizedConv2d = in_range(QuantizedConv2d(layer, bits, activation_bits), low)
    return made


def in_range(layer: Any, low: float = -0.7) -> Any:
    """Return ``layer`` with its input quantized in ``low`` to 1."""
    layer.input_quantizer.freeze(low, 1.0, False)
    return layer.eval()


GEOMETRIES = {
    "1 x 1": {"kernel_size": 1},
    "1 x 1, stride": {"kernel_size": 1, "stride": 2},
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "no bias, no padding": {"kernel_size": 3, "bias": False},
    "5 x 5, stride": {"kernel_size": 5, "stride": 2, "padding": 2},
    "4 x 4, stride 3": {"kernel_size": 4, "stride": 3, "padding": 1},
    "oblong": {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (1, 2)},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
}


@pytest.mark.parametrize("bits", [2, 5, 8, 9, 15])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_an_integer_convolution_is_the_quantized_one(geometry: dict[str, Any], bits: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(quantized(nn.Conv2d(16, 20, **geometry), bits))
    for size in ((2, 16, 11, 14), (1, 16, 8, 9)):
        x = torch.empty(size).uniform_(-1, 1.3)  # beyond the range on both sides
        found, kinds, runs = in_onnx(layers, x)
        assert runs == "int8"
        assert "MatMul" in kinds
        assert "Conv" not in kinds
        with torch.no_grad():
            torch.testing.assert_close(found, layers(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "runs"), [(nn.Conv2d, "int8"), (nn.ConvTranspose2d, "int8"), (nn.Conv2d, "float32")]
)
def test_steps_per_channel_are_folded_into_the_weights(make: Any, runs: str) -> None:
    torch.manual_seed(0)
    layer = in_range(quantize_layer(make(16, 12, 4, 2, 1), 8, 8 if runs == "int8" else 16))
    layer.set_spread([-0.2 * channel for channel in range(16)])
    layers = nn.Sequential(layer)
    x = torch.empty(1, 16, 9, 8).uniform_(-1, 1.3) * torch.exp(-0.2 * torch.arange(16.0)).view(-1, 1, 1)
    found, _, computed_in = in_onnx(layers, x)
    assert computed_in == runs
    with torch.no_grad():
        expected = layers(x)
    # A value at a tie may be rounded the other way.
    assert (found - expected).abs().median() < 1e-5 * expected.std()


@pytest.mark.parametrize(("bits", "activation_bits"), [(8, 4), (8, 8), (15, 8)])
def test_the_largest_sums_are_exact(bits: int, activation_bits: int) -> None:
    # Processors without VNNI saturate sums of two products, unless told otherwise.
    layer = nn.Conv2d(64, 32, 3)
    with torch.no_grad():
        layer.weight.fill_(1.0)[::2] = -1.0
    layers = nn.Sequential(quantized(layer, bits, activation_bits, low=0.0))
    x = torch.ones(1, 64, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(in_onnx(layers, x)[0], layers(x), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose2d"])
def test_a_float_convolution_keeps_its_weights(kind: str, activation_bits: int) -> None:
    # Between two quantizers, ONNX Runtime would round them to 8 bits with one step for the tensor: next to the first
    # output channel, all others would be zero.
    torch.manual_seed(0)
    make: Any = {"Conv2d": QuantizedConv2d, "ConvTranspose2d": QuantizedConvTranspose2d}[kind]
    first = getattr(nn, kind)(3, 16, 3, padding=1)
    with torch.no_grad():
        first.weight.select(0 if kind == "Conv2d" else 1, 0).mul_(1000)
    layers = nn.Sequential(
        in_range(make(first, 8, activation_bits)), nn.ReLU(), quantized(nn.Conv2d(16, 4, 1), 8, low=0.0)
    )
    x = torch.empty(2, 3, 16, 24).uniform_(-0.5, 0.9)
    found, _, runs = in_onnx(layers, x)
    assert runs == "float32"
    with torch.no_grad():
        expected = layers(x)
    # A value at a tie of the second quantizer may be rounded the other way, which four outputs see.
    assert (found - expected).abs().median() < 1e-5 * expected.std()


@pytest.mark.parametrize("factor", [2, 3])
def test_a_pixel_shuffle_gets_its_channels_in_its_order(factor: int) -> None:
    torch.manual_seed(0)
    second = quantized(nn.Conv2d(16, 5, 3, padding=1), 8, low=-3.0)
    layers = nn.Sequential(
        quantized(nn.Conv2d(16, 16 * factor**2, 3, padding=1), 8),
        nn.PixelShuffle(factor),
        nn.LeakyReLU(),
        second,
    )
    x = torch.empty(2, 16, 6, 7).uniform_(-1, 1)
    found, kinds, _ = in_onnx(layers, x)
    assert "DepthToSpace" not in kinds
    with torch.no_grad():
        assert (found - layers(x)).abs().median() < 1e-5  # but for ties of the second layer's input


def test_norms_keep_the_layout() -> None:
    torch.manual_seed(0)
    norm = QuantizedGDN(GDN(20), 8, 8).eval()
    assert norm.input_quantizer is not None
    norm.input_quantizer.freeze(-3.0, 3.0, False)
    layers = nn.Sequential(
        quantized(nn.Conv2d(16, 20, 3), 8), norm, quantized(nn.Conv2d(20, 4, 3), 8, low=-3.0)
    )
    x = torch.empty(2, 16, 9, 7).uniform_(-1, 1)
    found, kinds, _ = in_onnx(layers, x)
    norm.input_quantizer = None  # it is not rounded in ONNX
    assert "Conv" not in kinds
    with torch.no_grad():
        assert (found - layers(x)).abs().median() < 1e-5


def test_layers_that_cannot_run_in_float() -> None:
    x = torch.rand(1, 16, 8, 8)
    reasons = {
        "groups": quantized(nn.Conv2d(16, 16, 3, groups=2), 8),
        "bits": quantized(nn.Conv2d(16, 16, 3), 16),
        "input": quantized(nn.Conv2d(16, 16, 3), 8, 10),
        "pads": quantized(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), 8),
    }
    for layer in reasons.values():
        layers = nn.Sequential(layer)
        found, kinds, runs = in_onnx(layers, x)
        assert runs == "float32"
        assert "Conv" in kinds
        with torch.no_grad():
            torch.testing.assert_close(found, layers(x), rtol=1e-4, atol=1e-4)
