"""Decide which layers run in 8-bit integers."""

from torch import fx, nn

from fmpq_fx.passes.annotation import Arithmetic, annotate
from fmpq_fx.quant.layers import QuantizedConv2d, QuantizedGDN, QuantizedLayer

BITS = 8
"""Of the integers that kernels multiply. Wider weights take two products, of their high and of their low part."""

MOST_BITS = 15
"""Of weights that have two such parts."""

LEAST_CHANNELS = 16
"""With fewer input channels an integer convolution is slower than a float one (measured)."""

_WIDEST_SUM = 2**31 - 1  # kernels add up in int32


def run_in_integers(gm: fx.GraphModule) -> fx.GraphModule:
    """Note on each node of ``gm`` that calls a quantized layer what the layer computes in.

    Inputs and weights of quantized layers are integers anyway, and sums of their products are exact: a convolution
    whose input has up to 8 bits computes in integers what it computes in float, up to float rounding.

    Args:
        gm: a calibrated graph that :func:`subpixel` lowered; it is changed.

    Returns:
        ``gm``. The norms of GDN, which run in float, see their input unrounded in it: no kernel needs it rounded,
        and that takes time.
    """
    for node in gm.graph.nodes:
        layer = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedLayer):
            continue
        reason = _obstacle(layer)
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
    """Say why ``layer`` cannot run in integers or would not be faster; None if it can."""
    quantizer, inner = layer.input_quantizer, layer.layer
    if isinstance(layer, QuantizedGDN):
        return "its squares have more than 8 bits"
    if not isinstance(layer, QuantizedConv2d) or not isinstance(inner, nn.Conv2d):
        return f"there is no integer form of a {type(inner).__name__}"
    if layer.bits > MOST_BITS:
        return f"its weights have {layer.bits} bits"
    if quantizer is None or quantizer.bits > BITS:
        return "its input is float" if quantizer is None else f"its input has {quantizer.bits} bits"
    if inner.in_channels < LEAST_CHANNELS:
        return f"int8 is not faster with {inner.in_channels} input channels"
    if inner.groups > 1:
        return f"it has {inner.groups} groups"
    if inner.padding_mode != "zeros":
        return f"it pads with {inner.padding_mode!r}"
    if layer.weight[0].numel() * quantizer.high * 2 ** (BITS - 1) > _WIDEST_SUM:
        return "its sums may have more than 32 bits"
    return None
