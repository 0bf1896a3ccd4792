"""Find the layers of a traced model that can be quantized, and the parameters that stay float."""

from collections.abc import Mapping

from compressai.layers import GDN
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate, graph_note
from fmpq_fx.passes.plan.tables import Site
from fmpq_fx.quant import quantized_class, quantized_layers

_CONTAINERS = nn.Sequential | nn.ModuleList | nn.ModuleDict


def find_sites(gm: fx.GraphModule) -> tuple[Site, ...]:
    """Return the sites of ``gm`` in the order in which the graph runs them.

    Layers inside an opaque module that is none of torch's own (a latent codec) are attributed to its node, in
    the order of registration. The names are noted on each node.

    Raises:
        FmpqError: there are no sites, ``gm`` is quantized already, a weight is not finite or in two layers, or a
            layer has hooks.
    """
    if quantized_layers(gm):
        raise FmpqError("the graph is quantized already; pass the graph that trace() made of the float model")
    sites: dict[str, Site] = {}
    names: dict[int, str] = {}  # by layer: one that is registered or called several times is one site
    owners: dict[int, str] = {}  # by parameter
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        found: dict[str, None] = {}  # in order, each once
        for name, layer in _layers_of(gm, str(node.target)).items():
            known = names.setdefault(id(layer), name)
            sites.setdefault(known, _site(known, layer, node))
            found[known] = None
            for parameter in _quantized_parameters(layer):
                owner = owners.setdefault(id(parameter), known)
                if owner != known:
                    raise FmpqError(
                        f"{owner!r} and {known!r} share one weight tensor, which cannot be quantized twice; give "
                        "each a copy, or call one layer in both places"
                    )
        if found:
            annotate(node, sites=tuple(found))
    if not sites:
        raise FmpqError(
            "the model has nothing to quantize: no Conv2d, ConvTranspose2d, MaskedConv2d, Linear or GDN is "
            "called as a module in its forward (functional convolutions stay float)"
        )
    return tuple(sites.values())


def check_weights(model: nn.Module) -> None:
    """Check that the weight of each quantizable layer of ``model`` is a parameter, which a quantized one can replace.

    Raises:
        FmpqError: one is computed from other parameters, as weight_norm and spectral_norm do.
    """
    for name, layer in model.named_modules():
        cls = quantized_class(layer)
        own = dict(layer.named_parameters(recurse=False))
        if cls is None or cls.weight_name in own:
            continue
        if is_parametrized(layer, cls.weight_name):
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {cls.weight_name!r})"
        else:
            remedy = "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
        raise FmpqError(
            f"the {cls.weight_name} of {name!r} is computed from other parameters, as weight_norm and spectral_norm "
            f"do, so that a quantized one could not take its place; bake it in first, on every such layer: {remedy}"
        )


def _layers_of(gm: fx.GraphModule, target: str) -> dict[str, nn.Module]:
    """Return the quantizable layers that a call of the module ``target`` runs, by qualified name."""
    module = gm.get_submodule(target)
    if quantized_class(module) is not None:
        return {target: module}
    if module.__module__.startswith("torch.nn"):
        # Such a module may read the weights of its parts without calling them (MultiheadAttention does).
        return {}
    inner = module.named_modules(prefix=target)
    return {name: layer for name, layer in inner if quantized_class(layer) is not None}


def _site(name: str, layer: nn.Module, node: fx.Node) -> Site:
    cls = quantized_class(layer)
    assert cls is not None  # _layers_of returns no others
    weight = cls.weight_of(layer)
    for parameter, values in {"weight": weight, **dict(layer.named_parameters())}.items():
        bad = int((~values.isfinite()).sum())
        if bad:
            raise FmpqError(
                f"{bad} of {values.numel()} values of {name}.{parameter} are NaN or infinite; load a checkpoint "
                "of a training run that did not diverge"
            )
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise FmpqError(
            f"{name!r} has forward hooks, which its quantized form would not run; remove them first"
        )
    return Site(name=name, node=node.name, kind=type(layer).__name__, params=weight.numel())


def _quantized_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the weight of ``layer`` is computed from; usually one."""
    cls = quantized_class(layer)
    assert cls is not None  # sites are made of no others
    return [p for name, p in layer.named_parameters() if name not in cls.float_names]


def float_remainder(gm: fx.GraphModule, sites: tuple[Site, ...]) -> dict[str, int]:
    """Return the parameters of ``gm`` that belong to no site's weight, which stay float: {name: elements}.

    These are biases and GDN's beta, entropy models, and weights that the forward reads without calling their layer.
    """
    quantized: set[int] = set()
    for site in sites:
        quantized |= {id(p) for p in _quantized_parameters(gm.get_submodule(site.name))}
    return {name: p.numel() for name, p in gm.named_parameters() if id(p) not in quantized}


def left_out(gm: fx.GraphModule, sites: tuple[Site, ...]) -> dict[str, str]:
    """Return why layers with weights are no sites, by the name of the layer in the model of ``gm``."""
    model = graph_note(gm).model
    modules = dict(model.named_modules())
    known = {id(modules[site.name]) for site in sites if site.name in modules}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | GDN
    return {
        name: _why_left_out(name, layer, modules, read)
        for name, layer in modules.items()
        if isinstance(layer, kinds) and id(layer) not in known
    }


def _why_left_out(name: str, layer: nn.Module, modules: Mapping[str, nn.Module], read: set[str]) -> str:
    if any(f"{name}.{parameter}" in read for parameter, _ in layer.named_parameters()):
        if quantized_class(layer) is None:
            return f"the forward of {type(layer).__name__} is its own"
        return "its weight is read without a call of the layer"
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        holder = modules[".".join(parts[:length])]
        if type(holder).__module__.startswith("torch.nn.") and not isinstance(holder, _CONTAINERS):
            return f"it is a part of torch's {type(holder).__name__}"
    return "it does not run in evaluation"
