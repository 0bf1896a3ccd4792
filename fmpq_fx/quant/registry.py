"""The registry of layers that can be quantized: float class -> quantized class."""

from compressai.layers import GDN, GDN1, MaskedConv2d
from torch import nn

from fmpq_fx.quant.layers import (
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedGDN,
    QuantizedGDN1,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMaskedConv2d,
)
from fmpq_fx.quant.masked import mask_name
from fmpq_fx.quant.rounding import LEAK

_REGISTRY: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
    MaskedConv2d: QuantizedMaskedConv2d,
    GDN: QuantizedGDN,
    GDN1: QuantizedGDN1,
}


def quantized_class(layer: nn.Module) -> type[QuantizedLayer] | None:
    """Return the class that quantizes ``layer``, or None if there is none.

    A subclass counts as its base unless it overrides ``forward``. An override that only masks the weight is allowed.
    """
    if mask_name(layer) is not None:
        return QuantizedMaskedConv2d
    for base in type(layer).__mro__:
        if base in _REGISTRY:
            same = all(
                getattr(type(layer), name, None) is getattr(base, name, None)
                for name in ("forward", "_conv_forward")
            )
            return _REGISTRY[base] if same else None
    return None


def quantize_layer(
    layer: nn.Module,
    bits: int,
    activation_bits: int | None = None,
    *,
    clip: float = 1.0,
    leak: float = LEAK,
    fitted: bool = True,
) -> QuantizedLayer:
    """Return ``layer`` with its weights quantized to ``bits`` and its input to ``activation_bits``.

    The arguments are those of :class:`QuantizedLayer`.

    Raises:
        TypeError: there is no quantized form of such a layer.
    """
    quantized = quantized_class(layer)
    if quantized is None:
        raise TypeError(
            f"a {type(layer).__name__} cannot be quantized; {', '.join(cls.__name__ for cls in _REGISTRY)} can"
        )
    return quantized(layer, bits, activation_bits, clip=clip, leak=leak, fitted=fitted)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a rewritten graph, or of a model that was converted from one, by site."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
