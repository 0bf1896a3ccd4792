"""The forms that layers are exported in, and the layers that run in 8-bit integers in each."""

import copy
import math
from collections.abc import Mapping

from torch import fx, nn

from fmpq_fx.onnx.grids import IntegerWeight, RoundedInput, container
from fmpq_fx.onnx.integer_convolution import IntegerConvolution
from fmpq_fx.onnx.subpixel import SubpixelConvolutions, SubpixelProducts, obstacle_to_lowering
from fmpq_fx.passes.annotation import Arithmetic, annotate, note_of
from fmpq_fx.quant.layers import (
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedGDN,
    QuantizedLayer,
    QuantizedLinear,
)

FORMS = ("portable", "onnxruntime")
"""The form "portable" has QuantizeLinear and DequantizeLinear around ordinary layers, which all runtimes read. The form
"onnxruntime" has matrix products of integers instead of convolutions, with which ONNX Runtime is faster on CPUs."""

BITS = 8
"""Bits of the integers that kernels multiply."""

MOST_BITS = 15
"""The most bits of weights in the form of ONNX Runtime, which multiplies their high and their low part separately."""

LEAST_CHANNELS = 16
"""With fewer input channels a product of integer matrices is slower than a float convolution (measured)."""

_WIDEST_SUM = 2**31 - 1  # kernels sum in int32


def note_arithmetic(gm: fx.GraphModule, form: str) -> fx.GraphModule:
    """Note on each node of ``gm`` that calls a quantized layer whether the layer runs in "int8" or "float32".

    Inputs and weights of quantized layers are integers anyway, and sums of their products are exact. So a convolution
    whose input has up to 8 bits computes the same in integers and in float, up to float rounding.

    Args:
        gm: a calibrated graph; it is changed.
        form: one of :data:`FORMS`.

    Returns:
        ``gm``. The norms of GDN run in float, and their input is no longer rounded: no kernel needs that, and it takes
        time.
    """
    for node in gm.graph.nodes:
        site = str(node.target)
        layer = gm.get_submodule(site) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLayer):
            continue
        reason = obstacle_to_lowering(gm, site) if isinstance(layer, QuantizedConvTranspose2d) else None
        reason = (
            reason or _obstacle(layer) or (_obstacle_to_products(layer) if form == "onnxruntime" else None)
        )
        if reason is None and form == "portable" and layer.bits > BITS:
            reason = f"its weights have {layer.bits} bits"
        why = (
            "its input and its weights are integers"
            if layer.bits <= BITS
            else "twice: its weights are two integers"
        )
        arithmetic = Arithmetic("float32", reason) if reason else Arithmetic("int8", why)
        annotate(node, arithmetic=arithmetic)
        if isinstance(layer, QuantizedGDN):
            layer.input_quantizer = None
    return gm


def _obstacle(layer: QuantizedLayer) -> str | None:
    """Return why no runtime can compute ``layer`` in integers; None if one can."""
    quantizer = layer.input_quantizer
    if isinstance(layer, QuantizedGDN):
        return "its squares have more than 8 bits"
    if not isinstance(layer, QuantizedConv2d | QuantizedConvTranspose2d | QuantizedLinear):
        return f"there is no integer form of a {type(layer.layer).__name__}"
    if quantizer is None or quantizer.bits > BITS:
        return "its input is float" if quantizer is None else f"its input has {quantizer.bits} bits"
    return None


def _obstacle_to_products(layer: QuantizedLayer) -> str | None:
    """Return why ``layer`` cannot be a product of integer matrices, or would not be faster as one; None if it can."""
    inner, quantizer = layer.layer, layer.input_quantizer
    assert quantizer is not None  # _obstacle refuses a float input
    if not isinstance(inner, nn.Conv2d | nn.ConvTranspose2d):
        return f"there is no integer form of a {type(inner).__name__}"
    if layer.bits > MOST_BITS:
        return f"its weights have {layer.bits} bits"
    if inner.in_channels < LEAST_CHANNELS:
        return f"int8 is not faster with {inner.in_channels} input channels"
    if inner.groups > 1:
        return f"it has {inner.groups} groups"
    if inner.padding_mode != "zeros":
        return f"it pads with {inner.padding_mode!r}"
    # Of a transposed convolution an output sees fewer taps.
    if math.prod(layer.layout[1:]) * quantizer.high * 2 ** (BITS - 1) > _WIDEST_SUM:
        return "its sums may have more than 32 bits"
    return None


def in_form(gm: fx.GraphModule, form: str) -> tuple[nn.Module, Mapping[str, str]]:
    """Return a copy of ``gm`` with the layers in the exported form, and the type that each stores its integers in.

    Args:
        gm: the result of :func:`note_arithmetic` for ``form``.
        form: one of :data:`FORMS`.
    """
    twin = copy.deepcopy(gm)
    stored: dict[str, str] = {}
    calls = {str(node.target): node for node in gm.graph.nodes if node.op == "call_module"}
    for site, node in calls.items():
        layer, lowered = twin.get_submodule(site), obstacle_to_lowering(gm, site) is None
        if isinstance(layer, QuantizedLayer):
            quantizer = layer.weight_quantizer
            stored[site] = str(container(quantizer.low, quantizer.high)).removeprefix("torch.")
        arithmetic = note_of(node).arithmetic
        if form == "onnxruntime" and arithmetic is not None and arithmetic.kind == "int8":
            if isinstance(layer, QuantizedConvTranspose2d):
                twin.set_submodule(site, SubpixelProducts(layer))
            else:
                assert isinstance(layer, QuantizedConv2d)
                twin.set_submodule(site, IntegerConvolution(layer))
        elif lowered:
            twin.set_submodule(site, SubpixelConvolutions(layer))
        elif isinstance(layer, QuantizedLayer):
            if layer.input_quantizer is not None:
                layer.input_quantizer = RoundedInput(layer)  # type: ignore[assignment]
            layer.weight_quantizer = IntegerWeight(layer)  # type: ignore[assignment]
    return twin, stored
