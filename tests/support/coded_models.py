"""Small quantized models whose latents, scales and means are lively, without measuring anything for their plans."""

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import compressai.models as zoo
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.plan.inputs import InputGrid
from fmpq_fx.passes.plan.tables import Sensitivity
from fmpq_fx.passes.plan.task import make_plan
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import quantized_layers
from support.traced_models import PLAIN, WITH_CODEC


def elic() -> nn.Module:
    """Return ELIC with short transforms: its own have most of its layers, and code nothing."""
    model, plain = WITH_CODEC["elic-official"](), zoo.FactorizedPrior(8, 16)
    model.g_a, model.g_s = plain.g_a, plain.g_s
    return model


CODED = {
    "scale hyperprior": PLAIN["scale hyperprior"],
    "mean-scale hyperprior": PLAIN["mean-scale hyperprior"],
    "mbt2018": lambda: zoo.JointAutoregressiveHierarchicalPriors(12, 12),  # whose compress() wants N = M
    "cheng2020-anchor": PLAIN["cheng2020-anchor"],
    "elic-official": elic,
    "cheng2020-checkerboard": WITH_CODEC["cheng2020-checkerboard"],
}
"""One model of each kind of entropy path; models that differ from these in the transforms alone are left out."""

WAYS_TO_CODE = [name for name in CODED if name != "cheng2020-anchor"]
"""One model of each way to code; the other one has the loop of mbt2018, and layers of the checkerboard's kinds."""


@functools.cache
def lively(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model and two images (2, 3, 128, 128) that it makes latents of some size from."""
    torch.manual_seed(0)
    model: Any = CODED[name]().eval()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not path.startswith(("g_a", "g_s")):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias)  # type: ignore[arg-type]
        if isinstance(layer, EntropyBottleneck):  # medians that are no fixed-point numbers
            layer.quantiles.data[:, 0, 1] = 0.3 * torch.randn(layer.channels)
    x = nn.functional.interpolate(torch.rand(2, 3, 16, 16), size=128, mode="bicubic")
    with torch.no_grad():
        for _ in range(5):
            louder = model.g_a[-1].weight if isinstance(model.g_a[-1], nn.Conv2d) else x
            louder.mul_(4 / model.g_a(x).std())
    return model, x


@functools.cache
def quantized(name: str, activation_bits: int | None = 8, bits: int = 6) -> Any:
    """Return the graph of a lively model at ``bits``, its activations calibrated on the first image."""
    return graph_of(*lively(name), activation_bits, bits)


def graph_of(
    model: nn.Module,
    x: Tensor,
    activation_bits: int | None = 8,
    bits: int = 6,
    fixed: Mapping[str, int | None] = MappingProxyType({}),
) -> Any:
    """Return the graph of ``model`` at ``bits``, its activations calibrated on the first image of ``x``.

    Args:
        model: what is quantized.
        x: images.
        activation_bits: of the inputs of all sites.
        bits: of the weights of all sites but the ``fixed``.
        fixed: the bits of single sites, None for those that stay float.
    """
    gm = trace(model, x)
    sites = find_sites(gm)
    zeros = {site.name: {bits: 0.0} for site in sites}
    table = Sensitivity(sites, 0.01, 0.0, 0.0, zeros, zeros, {}, "")
    plan = make_plan(table, target_cr=bits / 32, planner="uniform", activation_bits=activation_bits)
    plan = replace(plan, bits={**plan.bits, **fixed})
    gm = quantize(gm, plan)
    if activation_bits is not None:
        _observe(gm, x[:1])
    return gm


def _observe(gm: fx.GraphModule, x: Tensor) -> None:
    with torch.no_grad():
        gm(x)
    quantizers: Any = {site: layer.input_quantizer for site, layer in quantized_layers(gm).items()}
    for quantizer in quantizers.values():
        quantizer.freeze(*quantizer.range, quantizer.integral)
    observed = replace(
        plan_of(gm),
        inputs={
            site: InputGrid(quantizer.range[0], quantizer.range[1], quantizer.integral)
            for site, quantizer in quantizers.items()
        },
    )
    annotate_graph(gm, plan=observed)


@functools.cache
def codec(name: str, activation_bits: int | None = 8) -> Any:
    """Return the exact codec of a lively model; it is shared, so copy it before changing it."""
    return fmpq_fx.convert(quantized(name, activation_bits), exact="require")


@functools.cache
def _extreme(name: str, kind: str) -> Any:
    model, x = lively(name)
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    on_path = []
    for path, layer in model.named_modules():
        networks = ("h_s", "context_prediction", "entropy_parameters", "channel_context")
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and any(n in path.split(".") for n in networks):
            on_path.append(path)
            sign = torch.randint(0, 2, layer.weight.shape) * 2.0 - 1
            halves = torch.randint(-(2**12), 2**12, (layer.out_channels,)) + 0.5
            with torch.no_grad():
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(sign * 2 / math.sqrt(fan_in) if kind == "largest" else sign / 2)
                layer.bias.copy_(halves * 2**-12)  # type: ignore[union-attr]
    if kind == "largest":
        return graph_of(model, x, 8, 8)
    return graph_of(model, x, None, 8, dict.fromkeys(on_path))


def extreme(name: str, kind: str) -> Any:
    """Return an exact codec whose path has weights of one magnitude, random signs, and biases half way between numbers.

    "largest": every integer weight is the largest that there is, so that sums come as near to their bounds as they
    can. "ties": the weights are 1 / 2, exactly, on 24-bit inputs, so that half of the sums are ties.
    """
    return fmpq_fx.convert(_extreme(name, kind), exact="require")


def latents(codec: Any, coded: Any) -> Tensor:
    """Return what the decoder hands to the synthesis transform, float64."""
    seen: list[Tensor] = []
    handle = codec.g_s.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    try:
        with torch.no_grad():
            codec.decompress(coded["strings"], coded["shape"])
    finally:
        handle.remove()
    return seen[0]
