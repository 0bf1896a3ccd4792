"""Swap quantized layers into a traced model, as a plan says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import KEY, annotate_sites, graph_note, note_of
from fmpq_fx.passes.plan.tables import Plan
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.swap import replace_modules
from fmpq_fx.passes.tracing.module import TracedModule
from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_layers


class QuantizedGraphModule(TracedModule):
    """A graph that carries a plan, and fits into training loops that were written for a model of CompressAI."""

    def aux_loss(self) -> Tensor:
        """Return the auxiliary loss of the model, whose entropy models the graph shares, for a training loop."""
        model: Any = graph_note(self).model
        loss: Tensor = model.aux_loss()
        return loss

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise FmpqError, as :meth:`compress` and :meth:`decompress` do: a graph cannot code."""
        raise FmpqError(
            "a rewritten graph has no entropy coder; fmpq_fx.convert(gm) returns the model's own class, quantized and "
            "with its tables up to date, which has compress() and decompress()"
        )

    compress = decompress = update


def quantize(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Replace each site of ``gm`` by its quantized layer, in place, and return it as one that carries the plan.

    Layers get their weight scales here. Their input quantizers get the ranges that the plan has; without any
    they are observers that wait for calibration.

    Raises:
        FmpqError: the plan is of another model.
    """
    _check_same_sites(gm, plan)
    for layer in quantize_sites(gm, plan).values():
        layer.set_clip(layer.weight_quantizer.clip)
    annotate_sites(gm, bits=plan.bits)
    training_graph = gm.training_graph if isinstance(gm, TracedModule) else None
    result = QuantizedGraphModule(gm, gm.graph, training_graph, type(gm).__name__)
    result.train(gm.training)
    result.meta[KEY] = replace(graph_note(gm), plan=plan)
    for node in result.graph.nodes:
        if by_site := note_of(node).bits:  # shown by print_readable
            node.meta["custom"] = {"bits": by_site if len(by_site) > 1 else next(iter(by_site.values()))}
    result.graph.lint()
    return result


def quantize_sites(model: nn.Module, plan: Plan) -> dict[str, QuantizedLayer]:
    """Replace the sites of ``model``, a graph or a model of any class, by quantized layers and return these, by site.

    The steps of their weights are 1 until they are fitted or loaded.
    """
    layers, new = {}, {}
    for site, bits in plan.bits.items():
        if bits is not None:
            layer = model.get_submodule(site)
            layers[site] = new[layer] = _quantized(layer, plan, site, bits)
    replace_modules(model, new)
    return layers


def _quantized(layer: nn.Module, plan: Plan, site: str, bits: int) -> QuantizedLayer:
    clip = plan.clips.get(site, 1.0)
    quantized = quantize_layer(layer, bits, plan.activation_bits[site], clip=clip, fitted=False)
    if quantized.input_quantizer is not None and site in plan.inputs:
        grid = plan.inputs[site]
        quantized.set_spread(grid.log_spread, fitted=False)
        quantized.input_quantizer.freeze(grid.low, grid.high, grid.whole)
    return quantized.train(layer.training)


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
