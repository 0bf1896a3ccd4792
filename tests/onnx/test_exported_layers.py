"""Exported layers compute what the quantized layers compute, whatever their kind, geometry and widths."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fmpq_fx.quant import quantize_layer
from fmpq_fx.quant.layers import QuantizedLayer

pytest.importorskip("onnxscript", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from compressai.layers import GDN, GDN1, MaskedConv2d

from fmpq_fx.onnx.forms import in_form, note_arithmetic
from fmpq_fx.onnx.integer_convolution import IntegerConvolution
from fmpq_fx.onnx.subpixel import SubpixelProducts
from fmpq_fx.passes.annotation import note_of
from support.onnx_layers import Exported, exported

KINDS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(16, 6, 3, padding=1),
    "groups": lambda: nn.Conv2d(16, 8, 3, groups=4),
    "reflected": lambda: nn.Conv2d(16, 6, 3, padding=1, padding_mode="reflect"),
    "masked": lambda: MaskedConv2d(16, 6, 5, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(16, 32, 5, 2, 2, 1),
    "transposed_together": lambda: nn.ConvTranspose2d(16, 6, 5, 2, 2, 1),
    "transposed_groups": lambda: nn.ConvTranspose2d(16, 8, 3, 2, 1, groups=2),
    "transposed_cropped": lambda: nn.ConvTranspose2d(16, 32, 3, 2, 4),
    "transposed_not_lowered": lambda: nn.ConvTranspose2d(16, 8, 3, (1, 2), groups=2),
    "linear": lambda: nn.Linear(16, 6),
    "GDN": lambda: GDN(16),
    "IGDN": lambda: GDN(16, inverse=True),
    "GDN1": lambda: GDN1(16),
}
SPREAD = ("convolution", "linear", "transposed", "transposed_together")
"""Kinds whose input has a step per channel here."""
PAIRS = ((10, 16), (8, 8), (2, 8), (9, None), (5, 8), (3, 16), (6, None))
WIDTHS = {kind: [PAIRS[index % len(PAIRS)]] for index, kind in enumerate(KINDS)}
WIDTHS |= {kind: [(8, 8), (10, 16)] for kind in ("convolution", "GDN", "transposed")}
WIDTHS |= {kind: [(8, 8)] for kind in KINDS if kind.startswith("transposed_")}
"""Bits of the weight and of the input, None for a float one; one pair for most kinds: each layer more makes the export
longer."""

SPREADS = [0.1 * channel for channel in range(16)]
"""Logarithms of the factors between the steps."""


def away_from_ties(x: Tensor, layer: Any) -> Tensor:
    """Return ``x`` with all values at least a tenth of a step from where ``layer`` rounds its input up or down."""
    if layer.input_quantizer is None:
        return x
    step: Tensor = layer.input_quantizer.log_scale.detach().exp()
    if (spread := layer.weight_quantizer.log_spread) is not None:
        step = step * spread.exp().view(-1, *[1] * (-layer.channel_dim - 1))
    return x - 0.2 * (x - (x / step).round() * step)


def in_range(layer: nn.Module, bits: int, activation_bits: int | None = 8, low: float = -0.7) -> Any:
    """Return ``layer`` quantized, its input in ``low`` to 1 if it is rounded."""
    made: Any = quantize_layer(layer, bits, activation_bits).eval()
    if activation_bits is not None:
        made.input_quantizer.freeze(low, 1.0, False)
    return made


def case(kind: str, bits: int, activation_bits: int | None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = in_range(KINDS[kind](), bits, activation_bits)
    if kind in SPREAD and activation_bits is not None:
        layer.set_spread(SPREADS)
    # Beyond the range on both sides.
    return layer, away_from_ties(torch.empty(2, 16, 6, 16).uniform_(-1, 1.3), layer)


def largest(bits: int, activation_bits: int) -> tuple[nn.Module, Tensor]:
    layer = nn.Conv2d(576, 32, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)[::2] = -1.0
    return in_range(layer, bits, activation_bits, low=0.0), torch.ones(2, 576, 8, 9)


def uneven(kind: str, bits: int, activation_bits: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    first = getattr(nn, kind)(3, 16, 3, padding=1)
    with torch.no_grad():
        first.weight.select(0 if kind == "Conv2d" else 1, 0).mul_(1000)
    second = in_range(nn.Conv2d(16, 4, 1), 8, low=0.0)
    layers = nn.Sequential(in_range(first, bits, activation_bits), nn.ReLU(), second)
    return layers, torch.empty(2, 3, 16, 24).uniform_(-0.5, 0.9)


UNEVEN = [("Conv2d", 8, 8), ("Conv2d", 8, 16), ("ConvTranspose2d", 10, 8)]


@pytest.fixture(scope="module")
def portable() -> dict[str, Exported]:
    """Return all that is tried in the portable form, in one export."""
    named = {f"{kind}_{b}_{a}": case(kind, b, a) for kind in KINDS for b, a in WIDTHS[kind]}
    named |= {f"uneven_{kind}_{b}_{a}": uneven(kind, b, a) for kind, b, a in UNEVEN}
    return exported({**named, "largest": largest(8, 8)})


@pytest.mark.parametrize("kind", KINDS)
def test_every_width_in_every_kind_of_layer(kind: str, portable: dict[str, Exported]) -> None:
    for bits, activation_bits in WIDTHS[kind]:
        layer = portable[f"{kind}_{bits}_{activation_bits}"]
        torch.testing.assert_close(layer.found(), layer.expected, rtol=1e-4, atol=1e-4)
        unsigned = "GDN" in kind and bits == 8  # gamma is never negative
        assert layer.stored == ("uint8" if unsigned else "int8" if bits <= 8 else "int16")
        integers = "GDN" not in kind and kind != "transposed_not_lowered" and bits <= 8 == activation_bits
        assert layer.arithmetic.kind == ("int8" if integers else "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_openvino_computes_the_same(kind: str, portable: dict[str, Exported]) -> None:
    pytest.importorskip("openvino", reason="needs the extra: pip install 'fmpq-fx[openvino]'")
    for bits, activation_bits in WIDTHS[kind]:
        layer = portable[f"{kind}_{bits}_{activation_bits}"]
        torch.testing.assert_close(layer.found("openvino"), layer.expected, rtol=1e-4, atol=1e-4)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "point": {"kernel_size": 1},
    "stride": {"kernel_size": 5, "stride": 2, "padding": 2, "bias": False},
    "oblong": {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (1, 2)},
}


def convolution(
    bits: int, geometry: dict[str, Any], spread: Sequence[float] = ()
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return tried(nn.Conv2d(16, 20, **geometry), bits, spread)


def tried(float_layer: nn.Module, bits: int, spread: Sequence[float] = ()) -> tuple[nn.Module, Tensor]:
    layer = in_range(float_layer, bits)
    layer.set_spread(spread)
    return layer, away_from_ties(torch.empty(2, 16, 11, 14).uniform_(-1, 1.3), layer)


TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "apart": (lambda: nn.ConvTranspose2d(16, 32, 5, 2, 2, 1), 8, 4),
    "apart_twice": (lambda: nn.ConvTranspose2d(16, 32, (1, 4), 3, (0, 1), (2, 0)), 12, 2 * 9),
    "together": (lambda: nn.ConvTranspose2d(16, 3, 5, 2, 2, 1), 8, 1),
    "cropped": (lambda: nn.ConvTranspose2d(16, 32, 3, 2, 4), 8, 4),
}
"""Layer, bits of its weight, and the products of matrices that it becomes."""

GEOMETRIES_AND_BITS = [("point", 15), ("stride", 5), ("oblong", 15)]
SUMS = [(8, 8), (15, 8)]
OBSTACLES: dict[str, Callable[[], QuantizedLayer]] = {
    "has 2 groups": lambda: in_range(nn.Conv2d(16, 16, 3, groups=2), 8),
    "its weights have 16 bits": lambda: in_range(nn.Conv2d(16, 16, 3), 16),
    "its input has 10 bits": lambda: in_range(nn.Conv2d(16, 16, 3), 8, 10),
    "it pads with 'reflect'": lambda: in_range(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), 8),
    "not faster with 3 input channels": lambda: in_range(nn.Conv2d(3, 16, 3), 8),
    "has 4 groups": lambda: in_range(nn.ConvTranspose2d(16, 16, 3, 2, groups=4), 8),
    "not faster with 4 input channels": lambda: in_range(nn.ConvTranspose2d(4, 16, 3, 2), 8),
}


@pytest.fixture(scope="module")
def own_form() -> dict[str, Exported]:
    """Layers in the form of ONNX Runtime."""
    named = {f"{name}_{bits}": convolution(bits, GEOMETRIES[name]) for name, bits in GEOMETRIES_AND_BITS}
    named["spread"] = convolution(8, GEOMETRIES["point"], SPREADS)
    for name, (layer, bits, _) in TRANSPOSED.items():
        torch.manual_seed(0)
        named[name] = tried(layer(), bits, SPREADS)
    named |= {f"largest_{bits}_{activations}": largest(bits, activations) for bits, activations in SUMS}
    return exported(named, "onnxruntime")


@pytest.mark.parametrize(("geometry", "bits"), GEOMETRIES_AND_BITS)
def test_a_product_of_matrices_is_the_convolution(
    geometry: str, bits: int, own_form: dict[str, Exported]
) -> None:
    layer = own_form[f"{geometry}_{bits}"]
    assert layer.arithmetic.kind == "int8"
    assert ("twice" in layer.arithmetic.why) == (bits > 8)
    assert layer.kinds.count("MatMul") == (2 if bits > 8 else 1)
    assert "Conv" not in layer.kinds
    torch.testing.assert_close(layer.found(), layer.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_products_of_matrices_are_the_transposed_convolution(
    name: str, own_form: dict[str, Exported]
) -> None:
    layer, (_, _, products) = own_form[name], TRANSPOSED[name]
    assert layer.kinds.count("MatMul") == products
    torch.testing.assert_close(layer.found(), layer.expected, rtol=1e-5, atol=1e-5)


def test_a_product_of_matrices_has_a_step_per_input_channel(own_form: dict[str, Exported]) -> None:
    layer = own_form["spread"]
    assert layer.arithmetic.kind == "int8"
    assert "Conv" not in layer.kinds
    torch.testing.assert_close(layer.found(), layer.expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "activation_bits"), SUMS)
def test_the_largest_sums_are_exact(bits: int, activation_bits: int, own_form: dict[str, Exported]) -> None:
    # Processors without VNNI saturate sums of two products, unless told otherwise.
    layer = own_form[f"largest_{bits}_{activation_bits}"]
    torch.testing.assert_close(layer.found(), layer.expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("reason", OBSTACLES)
def test_layers_that_cannot_be_products_say_why(reason: str) -> None:
    root = nn.Sequential(OBSTACLES[reason]())
    graph = fx.Graph()
    graph.output(graph.call_module("0", (graph.placeholder("x"),)))
    gm = note_arithmetic(fx.GraphModule(root, graph), "onnxruntime")
    (arithmetic,) = (note_of(node).arithmetic for node in gm.graph.nodes if node.op == "call_module")
    assert arithmetic is not None
    assert arithmetic.kind == "float32"
    assert reason in arithmetic.why
    layers, _ = in_form(gm, "onnxruntime")
    assert not any(isinstance(layer, IntegerConvolution | SubpixelProducts) for layer in layers.modules())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layers_between_quantizers_keep_their_weights(runtime: str, portable: dict[str, Exported]) -> None:
    # ONNX Runtime rounds float weights there to 8 bits with one step for the tensor: next to the first output channel,
    # all others would be zero. And both runtimes may saturate sums of integers.
    pytest.importorskip(runtime)
    for layers in (portable[name] for name in portable if name.startswith(("uneven", "largest"))):
        expected = layers.expected
        # A value at a tie of the second quantizer may be rounded the other way, which four outputs see.
        assert (layers.found(runtime) - expected).abs().median() < 1e-5 * expected.std()
