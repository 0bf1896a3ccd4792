"""Lower transposed convolutions to convolutions followed by a pixel shuffle, with the same weights.

A transposed convolution of stride S computes each of the S x S sub-positions of its output with a separate part of the
kernel: output t = S * q + r sees input q + e with tap k if S * e = r + padding - k. These parts, padded with zeros to
one size, are the kernels of an ordinary convolution that runs at the resolution of the input and has S * S times the
channels; PixelShuffle puts its outputs in their places. Runtimes have integer kernels for convolutions, and hardly any
for transposed ones.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fmpq_fx.passes.annotation import KEY, annotate
from fmpq_fx.passes.transposed import Axis
from fmpq_fx.quant import quantized_class
from fmpq_fx.quant.layers import QuantizedConv2d, QuantizedConvTranspose2d


def subpixel(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of ``gm`` in which transposed convolutions are convolutions and ``F.pixel_shuffle``.

    Args:
        gm: any graph, rewritten or float. Calls of :class:`QuantizedConvTranspose2d` and of ``nn.ConvTranspose2d``
            with any kernel, padding, output padding, dilation and groups are lowered, unless the stride differs
            between the two dimensions, or a call has an output size. Quantized layers keep their integers (with zeros
            beside them), their steps, and the quantizer of their input.

    Returns:
        a graph that computes the same up to rounding errors of float32. It carries no plan. Each convolution has the
        name and the notes of the layer that it replaces, and that layer's geometry: ``note_of(node).subpixel``, two
        :class:`Axis`.
    """
    lowered = copy.deepcopy(gm)
    lowered.meta.pop(KEY, None)  # its plan and its model describe the layers before lowering
    done: dict[str, tuple[Axis, Axis]] = {}
    for node in list(lowered.graph.nodes):
        if node.op != "call_module":
            continue
        target = str(node.target)
        layer = lowered.get_submodule(target)
        if target not in done:
            if not _is_transposed(layer):
                continue
            if not _can_be_lowered(node, layer):
                continue
            done[target] = axes = _axes(_float_layer(layer))
            lowered.set_submodule(target, _convolution(layer, axes))
        _replace(node, done[target])
    lowered.graph.lint()
    lowered.recompile()
    return lowered


def _is_transposed(layer: nn.Module) -> bool:
    cls = type(layer) if isinstance(layer, QuantizedConvTranspose2d) else quantized_class(layer)
    return cls is QuantizedConvTranspose2d


def _float_layer(layer: nn.Module) -> nn.ConvTranspose2d:
    found = layer.layer if isinstance(layer, QuantizedConvTranspose2d) else layer
    assert isinstance(found, nn.ConvTranspose2d)
    return found


def _can_be_lowered(node: fx.Node, layer: nn.Module) -> bool:
    """Say whether the call ``node`` of the transposed convolution ``layer`` can be lowered."""
    stride = _float_layer(layer).stride
    if stride[0] != stride[1]:
        return False  # a pixel shuffle has one stride for both dimensions
    # A layer that is called several times is lowered once for all calls. A second argument is the output size, which
    # decides how much a call pads.
    calls = [other for other in node.graph.nodes if other.op == "call_module" and other.target == node.target]
    return all(len(call.args) == 1 and not call.kwargs for call in calls)


def _axes(layer: nn.ConvTranspose2d) -> tuple[Axis, Axis]:
    down, right = (
        Axis(
            layer.stride[i],
            layer.kernel_size[i],
            int(layer.padding[i]),
            layer.output_padding[i],
            layer.dilation[i],
        )
        for i in (0, 1)
    )
    return down, right


def lowered_weight(weight: Tensor, groups: int, axes: tuple[Axis, Axis]) -> Tensor:
    """Return the weight of the convolution, (out * S * S, in / groups, taps, taps), for that of a transposed one.

    Args:
        weight: the transposed convolution's weight, (in, out / groups, kH, kW).
        groups: the groups of both convolutions.
        axes: the geometry along rows and columns.
    """
    down, right = axes
    inputs, outputs = weight.shape[:2]
    dense = weight.new_zeros(inputs, outputs, down.extent, right.extent)
    dense[..., :: down.dilation, :: right.dilation] = weight
    padded = F.pad(dense, (right.front, right.back, down.front, down.back))
    split = padded.reshape(
        groups, inputs // groups, outputs, down.taps, down.stride, right.taps, right.stride
    )
    # A later tap of a transposed convolution meets an earlier input.
    ordered = split.flip(3, 5).permute(0, 2, 4, 6, 1, 3, 5)
    return ordered.reshape(-1, inputs // groups, down.taps, right.taps)


def _convolution(layer: nn.Module, axes: tuple[Axis, Axis]) -> nn.Module:
    """Return the convolution, quantized if ``layer`` is, with the padding if it can pad itself."""
    transposed = _float_layer(layer)
    down, right = axes
    places = down.stride * right.stride
    weight, bias = transposed.weight, transposed.bias
    convolution = nn.utils.skip_init(
        nn.Conv2d,
        transposed.in_channels,
        transposed.out_channels * places,
        (down.taps, right.taps),
        padding=(down.pads[0], right.pads[0]) if _even(axes) else 0,
        groups=transposed.groups,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        convolution.weight.copy_(lowered_weight(weight, transposed.groups, axes))
        if bias is not None:
            convolution.bias.copy_(bias.repeat_interleave(places))
        if not isinstance(layer, QuantizedConvTranspose2d):
            return convolution.train(layer.training)  # type: ignore[no-any-return]
        quantized = QuantizedConv2d(convolution, layer.bits)
        if (spread := layer.weight_quantizer.log_spread) is not None:
            quantized.set_spread(spread.tolist())
        quantized.weight_quantizer.log_scale.copy_(layer.weight_quantizer.log_scale.repeat_interleave(places))
    quantized.weight_quantizer.leak = layer.weight_quantizer.leak
    quantized.input_quantizer = layer.input_quantizer
    return quantized.train(layer.training)


def _even(axes: tuple[Axis, Axis]) -> bool:
    """Say whether the convolution can pad its input itself: as much behind as before, and not negative."""
    return all(axis.pads[0] == axis.pads[1] >= 0 for axis in axes)


def _replace(node: fx.Node, axes: tuple[Axis, Axis]) -> None:
    """Replace ``node`` by padding, convolution, shuffle and cropping, each only if needed."""
    down, right = axes
    graph = node.graph
    with graph.inserting_before(node):
        value = node.args[0]
        if not _even(axes):
            value = graph.call_function(F.pad, (value, (*right.pads, *down.pads)))
        value = graph.call_module(str(node.target), (value,))
        value.meta = dict(node.meta)
        annotate(value, subpixel=axes)
        if down.stride > 1:
            value = graph.call_function(F.pixel_shuffle, (value, down.stride))
        if down.surplus or right.surplus:
            rows, columns = (slice(None, -axis.surplus or None) for axis in axes)
            # torch.fx records slices with an ellipsis, but its types do not say so.
            value = graph.call_function(operator.getitem, (value, (..., rows, columns)))  # type: ignore[arg-type]
    node.replace_all_uses_with(value)
    graph.erase_node(node)
