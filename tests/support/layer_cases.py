"""The float layers that can be quantized, and what they compute in torch's own functions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d, SpectralConv2d
from torch import Tensor, nn

Rule = Callable[..., Tensor]  # (layer, input, weight) -> output
"""What a layer computes, in torch's functions, from the float layer, its input, and the weight to use."""


def conv(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), (0, 0)
    return F.conv2d(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def transposed(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    assert isinstance(layer, nn.ConvTranspose2d)
    stride, padding, extra, dilation = layer.stride, layer.padding, layer.output_padding, layer.dilation
    return F.conv_transpose2d(x, weight, layer.bias, stride, padding, extra, layer.groups, dilation)  # type: ignore[arg-type]


def linear(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(x, weight, layer.bias)


def gdn(layer: nn.Module, x: Tensor, weight: Tensor, weighted: Tensor | None = None) -> Tensor:
    """GDN, whose norm may see another input than the one that is normalized."""
    assert isinstance(layer, GDN)
    norm = F.conv2d(
        (x if weighted is None else weighted) ** 2, weight[:, :, None, None], layer.beta_reparam(layer.beta)
    )
    return x * (torch.sqrt(norm) if layer.inverse else torch.rsqrt(norm))


def gdn1(layer: nn.Module, x: Tensor, weight: Tensor, weighted: Tensor | None = None) -> Tensor:
    assert isinstance(layer, GDN1)
    norm = F.conv2d(
        (x if weighted is None else weighted).abs(), weight[:, :, None, None], layer.beta_reparam(layer.beta)
    )
    return x * (norm if layer.inverse else 1.0 / norm)


CASES: dict[str, tuple[Callable[[], nn.Module], Rule]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 5, stride=2, padding=2), conv),
    "conv without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), conv),
    "conv, padded by reflection": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), conv),
    "conv, padding 'same'": (lambda: nn.Conv2d(4, 6, 3, padding="same"), conv),
    "conv, 2 groups, dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), conv),
    "depthwise conv": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), conv),
    "deconv": (lambda: nn.ConvTranspose2d(4, 6, 5, stride=2, padding=2, output_padding=1), transposed),
    "deconv, 2 groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), transposed),
    "deconv, dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2), transposed),
    "depthwise deconv": (lambda: nn.ConvTranspose2d(4, 8, 4, stride=2, groups=4), transposed),
    "linear": (lambda: nn.Linear(8, 5), linear),
    "masked conv": (lambda: MaskedConv2d(4, 6, 5, padding=2), conv),
    "masked conv, type B": (lambda: MaskedConv2d(4, 6, 3, padding=1, mask_type="B"), conv),
    "checkerboard conv": (lambda: CheckerboardMaskedConv2d(4, 6, 5, padding=2), conv),
    "spectral conv": (lambda: SpectralConv2d(4, 6, 5, padding=2), conv),
    "conv with weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), conv),
    "GDN": (lambda: GDN(4), gdn),
    "inverse GDN": (lambda: GDN(4, inverse=True), gdn),
    "GDN1": (lambda: GDN1(4), gdn1),
    "inverse GDN1": (lambda: GDN1(4, inverse=True), gdn1),
}

each_layer = pytest.mark.parametrize(("make", "rule"), CASES.values(), ids=CASES)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the layer with all parameters away from their initial values."""
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    return layer


def effective(layer: nn.Module) -> Tensor:
    """Return the weight that the float layer multiplies with."""
    if isinstance(layer, GDN):
        return layer.gamma_reparam(layer.gamma).detach()  # type: ignore[no-any-return]
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach()
    return weight * layer.mask if isinstance(layer, MaskedConv2d) else weight


def output_channels(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """Return a view of ``weight`` for each output channel, cut out by the definition of the layer."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return list(weight)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    groups = range(layer.groups)
    return [weight[g * inputs : (g + 1) * inputs, j] for g in groups for j in range(outputs)]
