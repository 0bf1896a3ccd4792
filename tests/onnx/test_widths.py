"""ONNX Runtime has the kernels for weights of every width in every kind of layer, and computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmpq_fx.quant import ActivationFakeQuant, quantize_layer
from fmpq_fx.quant.layers import QuantizedGDN

pytest.importorskip("onnx", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")

from compressai.layers import GDN, GDN1, MaskedConv2d

from support.onnx_layers import in_onnx

KINDS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(16, 6, 3, padding=1),
    "convolution, stride": lambda: nn.Conv2d(16, 6, 5, stride=2, padding=2),
    "convolution, groups": lambda: nn.Conv2d(16, 8, 3, groups=4),
    "convolution, reflected": lambda: nn.Conv2d(16, 6, 3, padding=1, padding_mode="reflect"),
    "masked": lambda: MaskedConv2d(16, 6, 5, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(16, 6, 5, 2, 2, 1),
    "transposed, stride 3": lambda: nn.ConvTranspose2d(16, 6, 4, 3),
    "transposed, groups": lambda: nn.ConvTranspose2d(16, 8, 3, 2, 1, groups=2),
    "transposed, dilated": lambda: nn.ConvTranspose2d(16, 6, 3, 2, dilation=2),
    "transposed, not lowered": lambda: nn.ConvTranspose2d(16, 6, 3, (1, 2)),
    "linear": lambda: nn.Linear(16, 6),
    "GDN": lambda: GDN(16),
    "IGDN": lambda: GDN(16, inverse=True),
    "GDN1": lambda: GDN1(16),
}


def away_from_ties(x: Tensor, quantizer: ActivationFakeQuant) -> Tensor:
    """Return ``x`` with all values at least a tenth of a step from where ``quantizer`` rounds up or down."""
    step = quantizer.log_scale.detach().exp()
    return x - 0.2 * (x - (x / step).round() * step)


@pytest.mark.parametrize("bits", range(2, 11))
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_in_every_kind_of_layer(kind: str, bits: int) -> None:
    for activation_bits in (None, 8, 4 if bits % 2 else 10):
        torch.manual_seed(0)
        plain = KINDS[kind]()
        layer: Any = quantize_layer(plain, bits, activation_bits).eval()
        x = torch.empty(2, getattr(plain, "in_channels", 16), 6, 16).uniform_(-1, 1.3)
        if layer.input_quantizer is not None:
            layer.input_quantizer.freeze(-0.7, 1.0, False)
            x = away_from_ties(x, layer.input_quantizer)
        layers = nn.Sequential(layer)
        found, _, _ = in_onnx(layers, x)
        if isinstance(layer, QuantizedGDN):
            layer.input_quantizer = None  # it is not rounded in ONNX
        with torch.no_grad():
            torch.testing.assert_close(found, layers(x), rtol=1e-4, atol=1e-4)
