"""Swap quantized layers into a traced model, as a plan says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.plan.tables import Plan
from fmpq_fx.passes.sites import annotate, find_sites
from fmpq_fx.passes.swap import replace_module
from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_layers


class QuantizedGraphModule(fx.GraphModule):
    """A GraphModule whose plan survives ``torch.save``; fx pickles the code of a graph, but not its notes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the plan and the notes on the nodes beside what fx pickles."""
        rebuild, arguments = super().__reduce__()
        notes = [node.meta.get("fmpq") for node in self.graph.nodes]
        return _rebuild, (rebuild, arguments, notes, self.meta)


def _rebuild(
    rebuild: Any, arguments: tuple[Any, ...], notes: list[Any], meta: dict[str, Any]
) -> fx.GraphModule:
    plain: fx.GraphModule = rebuild(*arguments)
    gm = QuantizedGraphModule(plain, plain.graph, type(plain).__name__)
    gm.train(plain.training)
    # fx traces the code again, which gives the same nodes in the same order, under names of its own choice.
    for node, note in zip(gm.graph.nodes, notes, strict=True):
        if note is not None:
            node.meta["fmpq"] = note
    gm.meta.update(meta)
    _carry(gm, meta["fmpq"], meta["model"])
    return gm


def _carry(gm: fx.GraphModule, plan: Plan, model: nn.Module) -> None:
    """Write ``plan`` and ``model`` on ``gm``, and the bits on its nodes, also where ``print_readable`` shows them."""
    gm.meta["fmpq"] = plan
    gm.meta["model"] = model
    annotate(gm, "bits", plan.bits)
    for node in gm.graph.nodes:
        if "fmpq" in node.meta:
            bits = node.meta["fmpq"]["bits"]
            node.meta["custom"] = {"bits": bits if len(bits) > 1 else next(iter(bits.values()))}


def quantize(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Replace each site of ``gm`` by its quantized layer, in place, and return it as one that carries the plan.

    Layers get their weight scales here. Their input quantizers get the ranges that the plan has; without any
    they are observers that wait for calibration.

    Raises:
        FmpqError: the plan is of another model.
    """
    _check_same_sites(gm, plan)
    for site, bits in plan.bits.items():
        if bits is not None:
            quantize_site(gm, plan, site, bits)
    result = QuantizedGraphModule(gm, gm.graph, type(gm).__name__)
    result.train(gm.training)
    _carry(result, plan, gm.meta["model"])
    result.graph.lint()
    return result


def quantize_site(model: nn.Module, plan: Plan, site: str, bits: int) -> QuantizedLayer:
    """Replace one site of ``model``, a graph or a model of any class, by its quantized layer and return that."""
    layer = model.get_submodule(site)
    clip = plan.clips.get(site, 1.0)
    quantized = quantize_layer(layer, bits, plan.activation_bits, clip=clip).train(layer.training)
    if quantized.input_quantizer is not None and site in plan.ranges:
        low, high = plan.ranges[site]
        quantized.input_quantizer.freeze(low, high, site in plan.integral)
    replace_module(model, layer, quantized)
    return quantized


def _check_same_sites(gm: fx.GraphModule, plan: Plan) -> None:
    found = {site.name: site for site in find_sites(gm)}
    planned = {site.name: site for site in plan.sites}
    if found == planned:
        return
    differing = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
    name = differing[0]
    raise FmpqError(
        f"the plan is of another model: they differ in {len(differing)} sites, the first of them {name!r} (model: "
        f"{found.get(name, 'no such site')}; plan: {planned.get(name, 'no such site')}); make a plan of this "
        "model with prepare()"
    )


@contextmanager
def activations_float(gm: fx.GraphModule) -> Iterator[None]:
    """Within the block, the rewritten graph ``gm`` runs with its weights quantized and its activations float."""
    layers = quantized_layers(gm).values()
    quantizers = [layer.input_quantizer for layer in layers]
    try:
        for layer in layers:
            layer.input_quantizer = None
        yield
    finally:
        for layer, quantizer in zip(layers, quantizers, strict=True):
            layer.input_quantizer = quantizer


def plan_of(gm: fx.GraphModule) -> Plan:
    """Return the plan that the rewritten graph ``gm`` carries.

    Raises:
        FmpqError: ``gm`` is not the result of ``prepare`` or ``rewrite``.
    """
    plan = getattr(gm, "meta", {}).get("fmpq")
    if not isinstance(plan, Plan):
        raise FmpqError(
            f"this {type(gm).__name__} carries no plan: pass what fmpq_fx.prepare() or fmpq_fx.rewrite() returned"
        )
    return plan
