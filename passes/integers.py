"""Choose which layers run in 8-bit integers, by what the rounding of their outputs costs in RD loss.

The input and the weight of a quantized layer are integers anyway, and sums of their products are exact. What an integer
kernel adds is that its output leaves with 8 bits. Where the only reader quantizes it anyway, that costs
nothing. Elsewhere the cost is measured, layer by layer, and those that save most work for their cost are chosen.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fmpq_fx.passes.incremental import Change, ChangeMeter, mean_rd, replace_module
from fmpq_fx.passes.parts import cut
from fmpq_fx.quant.layers import QuantizedConv2d, QuantizedGDN, QuantizedLayer
from fmpq_fx.quant.outputs import LAST, RoundedOutput

BITS = 8
"""Of the integers that kernels multiply."""

LEAST_CHANNELS = 16
"""With fewer input or output channels an integer convolution is slower than a float one (measured)."""

ROUNDED_PARTS = ("analysis", "hyper_analysis", "synthesis")
"""Parts whose outputs may be rounded at a cost. The others decide how symbols are coded, and stay as they are."""

_BETWEEN = (F.relu, torch.relu, F.pixel_shuffle, F.pad)  # rounding before them is rounding behind them

MARGIN = 1.1
"""What the ranges of outputs are widened by, since calibration has not seen all images."""


@dataclass(frozen=True)
class Run:
    """How a layer runs, as ``node.meta["fmpq"]["run"]`` says."""

    kind: str  # "int8" or "float32"
    why: str
    cost: float | None = None  # of int8 alone, in RD loss, as a fraction; None where it was not measured


@dataclass(frozen=True)
class _Seen:
    """What was seen of a layer over the calibration."""

    low: Tensor  # of its output, per channel
    high: Tensor
    work: float  # multiply-accumulates


def run_in_integers(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    lmbda: float,
    *,
    tolerance: float = 0.001,
    progress: bool | None = None,
) -> fx.GraphModule:
    """Let layers of ``gm`` run in integers, in place, as :class:`RoundedOutput`.

    Args:
        gm: a calibrated graph in evaluation mode that :func:`subpixel` lowered.
        batches: images, (B, 3, H, W) each, in [0, 1], to measure ranges and RD loss on.
        lmbda: the Lagrangian of the RD loss.
        tolerance: by how much the RD loss may rise, 0.001 for 0.1 %. With 0 only those layers run in integers
            for which it makes no difference.
        progress: show a progress bar; None shows it on terminals only.

    Returns:
        ``gm``, which computes what integer kernels compute, up to float rounding, with a :class:`Run` on each
        node of a quantized layer. Norms of GDN that stay float see their input unrounded, with a tolerance: no
        kernel needs it rounded, and it takes time.
    """
    runs: dict[str, Run] = {}
    candidates: dict[str, fx.Node] = {}
    for part in cut(gm):
        for node in part.nodes:
            layer = _quantized(gm, node)
            if layer is None:
                continue
            site = str(node.target)
            reason = obstacle(gm, node, layer)
            grid = None if reason else _grid_of_reader(gm, node)
            if reason is not None:
                runs[site] = Run("float32", reason)
            elif grid is not None:
                replace_module(gm, layer, RoundedOutput(layer, *grid))
                runs[site] = Run("int8", "what reads it rounds it anyway")
            elif not any(part.name.startswith(name) for name in ROUNDED_PARTS):
                runs[site] = Run("float32", "entropy coding depends on its output, which is read unrounded")
            elif node in part.outputs:
                # A latent beyond what calibration saw would be clipped, and its image spoilt.
                runs[site] = Run("float32", "its output leaves the part, and has no range that is sure")
            else:
                candidates[site] = node
    if batches:
        runs |= _chosen(gm, batches, lmbda, tolerance, candidates, progress)
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in runs:
            node.meta["fmpq"] = {**node.meta.get("fmpq", {}), "run": runs[str(node.target)]}
    return gm


def _quantized(gm: fx.GraphModule, node: fx.Node) -> QuantizedLayer | None:
    layer = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return layer if isinstance(layer, QuantizedLayer) else None


def obstacle(gm: fx.GraphModule, node: fx.Node, layer: QuantizedLayer) -> str | None:
    """Say why ``layer``, which ``node`` calls, cannot run in integers or would not be faster; None if it can."""
    quantizer = layer.input_quantizer
    if not isinstance(layer, QuantizedConv2d | QuantizedGDN):
        return f"there is no integer form of a {type(layer.layer).__name__}"
    if layer.bits > BITS:
        return f"its weights have {layer.bits} bits"
    if quantizer is None or quantizer.bits > BITS:
        return "its input is float" if quantizer is None else f"its input has {quantizer.bits} bits"
    if isinstance(layer, QuantizedGDN):
        # Measured with 64 and 128 channels: rounding squares and unrounding sums takes longer than integers save.
        return "int8 is not faster: its squares and sums would have to be rounded and unrounded"
    weight = layer.weight
    if min(weight.shape[:2]) < LEAST_CHANNELS:
        return f"int8 is not faster with {weight.size(1)} channels in and {weight.size(0)} out"
    if sum(other.target == node.target for other in gm.graph.nodes if other.op == "call_module") > 1:
        return "it is called several times, and its outputs have several ranges"
    if layer.layer.padding_mode != "zeros":
        return f"it pads with {layer.layer.padding_mode!r}"
    return None


def _grid_of_reader(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Return the grid on which the only reader of ``node`` rounds it, if what lies between changes no rounding."""
    reader, between = node, True
    while between:
        if len(reader.users) != 1:
            return None
        (reader,) = reader.users
        module = gm.get_submodule(str(reader.target)) if reader.op == "call_module" else None
        between = isinstance(module, nn.ReLU) or reader.target in _BETWEEN
    if isinstance(module, RoundedOutput):
        module = module.layer
    quantizer = module.input_quantizer if isinstance(module, QuantizedConv2d) else None
    source = _quantized(gm, node)
    if quantizer is None or quantizer.bits > BITS or not isinstance(source, QuantizedConv2d):
        return None
    like = source.weight.new_ones(source.weight.size(0))
    zero_point = quantizer.zero_point.detach().round().clamp(0, quantizer.high)
    return like * quantizer.log_scale.detach().exp(), like * zero_point


@torch.no_grad()
def _chosen(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    lmbda: float,
    tolerance: float,
    candidates: Mapping[str, fx.Node],
    progress: bool | None,
) -> dict[str, Run]:
    """Put integer layers in the places of those ``candidates`` whose cost, together, is within the tolerance."""
    seen = _observe(gm, batches, candidates)
    made = {site: _integer_form(gm, node, seen[site]) for site, node in candidates.items()}

    def change(site: str) -> Change:
        return site, lambda _: made[site]

    changes = {site: change(site) for site in candidates}
    meter = ChangeMeter(gm, batches)
    changed = meter.sums_of(changes, description="integer layers", progress=progress)
    float_rd = meter.base.rd(lmbda)
    cost = {site: sums.rd(lmbda) / float_rd - 1 for site, sums in changed.items()}
    norms = {m: m.input_quantizer for m in gm.modules() if isinstance(m, QuantizedGDN)}
    order = sorted(candidates, key=lambda site: max(cost[site], 0.0) / seen[site].work)

    def too_much(count: int, rounded_norms: bool = False) -> bool:
        """Let the first ``count`` run in integers, and say whether that is beyond the tolerance."""
        for layer, quantizer in norms.items():
            layer.input_quantizer = quantizer if rounded_norms else None
        for index, site in enumerate(order):
            form = made[site]
            replace_module(gm, gm.get_submodule(site), form if index < count else form.layer)
        return mean_rd(gm, batches, lmbda) > float_rd * (1 + tolerance)

    # What they cost together is measured, since costs do not quite add up.
    count = bisect(range(1, len(order) + 1), False, key=too_much) if tolerance > 0 else 0
    if tolerance == 0 or too_much(count):
        too_much(count, rounded_norms=True)
    chosen = order[:count]
    kinds = {site: "int8" if site in chosen else "float32" for site in candidates}
    words = {site: f"in int8 the RD loss rises by {100 * cost[site]:.3f} %" for site in candidates}
    return {site: Run(kinds[site], words[site], cost[site]) for site in candidates}


def _observe(
    gm: fx.GraphModule, batches: Sequence[Tensor], candidates: Mapping[str, fx.Node]
) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    hooks = []
    for site in candidates:

        def watch(layer: Any, args: tuple[Tensor, ...], out: Tensor, site: str = site) -> None:
            low, high = out.amin((0, 2, 3)).clamp(max=0), out.amax((0, 2, 3)).clamp(min=0)
            work = layer.weight[0].numel() * out.numel()
            if site in seen:
                before = seen[site]
                low, high = low.minimum(before.low), high.maximum(before.high)
                work += before.work
            seen[site] = _Seen(low, high, work)

        hooks.append(gm.get_submodule(site).register_forward_hook(watch))
    try:
        for x in batches:
            gm(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _integer_form(gm: fx.GraphModule, node: fx.Node, seen: _Seen) -> RoundedOutput:
    layer = gm.get_submodule(str(node.target))
    low, high = seen.low * MARGIN, seen.high * MARGIN
    assert isinstance(layer, QuantizedConv2d)
    axes = node.meta.get("subpixel")
    if axes is not None:  # the sub-positions of a channel are neighbours in the image that they make
        places = axes[0].stride * axes[1].stride
        low = low.view(-1, places).amin(1).repeat_interleave(places)
        high = high.view(-1, places).amax(1).repeat_interleave(places)
    scale = torch.where(high > low, (high - low) / LAST, 1.0)
    return RoundedOutput(layer, scale, (-low / scale).round())
