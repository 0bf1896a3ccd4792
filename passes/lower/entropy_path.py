"""Find the entropy path: the modules between the coded latents and the parameters that choose their CDFs.

Their results must be the same on the machine that decodes, to the last bit, or the image is destroyed. The path is
followed backwards through the graph (:mod:`fmpq_fx.passes.lower.walk`). It begins at the parameters of conditional
entropy models, and at likelihoods that no entropy model computed, and ends at latents that the decoder has. It also
goes through the networks inside CompressAI's latent codecs, which the graph keeps whole.
"""

import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from compressai.entropy_models import (
    EntropyBottleneck,
    EntropyModel,
    GaussianConditional,
    GaussianMixtureConditional,
)
from compressai.latent_codecs import (
    ChannelGroupsLatentCodec,
    CheckerboardLatentCodec,
    EntropyBottleneckLatentCodec,
    GaussianConditionalLatentCodec,
    HyperLatentCodec,
    HyperpriorLatentCodec,
    LatentCodec,
)
from compressai.models import JointAutoregressiveHierarchicalPriors
from torch import fx, nn

from fmpq_fx.passes.annotation import graph_note
from fmpq_fx.passes.lower.extents import float_layer
from fmpq_fx.passes.lower.rounded import arguments_of
from fmpq_fx.passes.lower.walk import Draft, Walk
from fmpq_fx.passes.tracing.leaves import NetworkTracer
from fmpq_fx.quant.masked import mask_name

_NETWORKS: dict[type, tuple[str, ...]] = {
    HyperpriorLatentCodec: (),
    EntropyBottleneckLatentCodec: (),
    HyperLatentCodec: ("h_s",),
    GaussianConditionalLatentCodec: ("entropy_parameters",),
    CheckerboardLatentCodec: ("context_prediction", "entropy_parameters"),
    ChannelGroupsLatentCodec: ("channel_context",),
}
"""The networks of each latent codec that lie on the path."""


@dataclass(frozen=True)
class EntropyPath:
    """The names of the modules on the entropy path of a model, and the obstacles to exact arithmetic there."""

    layers: tuple[str, ...]  # layers that multiply, in no particular order
    activations: tuple[str, ...]  # LeakyReLU
    priors: tuple[str, ...]  # entropy bottlenecks whose latents enter the path
    in_order: bool  # the model codes its latents one after the other, in the loops of mbt2018
    obstacles: tuple[str, ...]  # each names a node and says why it cannot be exact
    # Layers saturate at 4096 / terms, so that results computed from them have no more than 24 bits.
    terms: int = 1
    # Parameters and buffers on the path that must be made fixed-point numbers.
    constants: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return the path as a model file holds it. Like older files, it has "constants" only if there are some."""
        fields = asdict(self)
        return (
            fields if self.constants else {key: value for key, value in fields.items() if key != "constants"}
        )


def entropy_path(gm: fx.GraphModule) -> EntropyPath:
    """Return the entropy path of the traced or rewritten graph ``gm``; it is empty where all CDFs are fixed."""
    draft = Draft()
    walk = Walk(draft, gm, gm.graph, state=graph_note(gm).model)
    called = {n: gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"}
    for node, module in called.items():
        if isinstance(module, EntropyModel | LatentCodec):
            scales, means = _parameters(node, module)
            walk.follow(scales)
            walk.follow_means(means)
        if isinstance(module, GaussianConditional):
            _check_conditional(draft, str(node.target), module)
    walk.follow(_likelihoods_of_others(gm, called, walk.extents.sizes))
    _check_calls_elsewhere(draft, called, walk.seen)
    masked = [name for name, layer in draft.layers.items() if mask_name(float_layer(layer))]
    in_order = _codes_in_order(graph_note(gm).model, masked)
    for name in [] if in_order else masked:
        draft.stop(
            name, "is a masked convolution, and the coding loop that reads its weight is not mbt2018's"
        )
    for node, module in called.items():
        if isinstance(module, LatentCodec):
            _enter(draft, str(node.target), module)
    return EntropyPath(
        tuple(draft.layers),
        tuple(draft.activations),
        tuple(draft.priors),
        in_order,
        tuple(draft.obstacles),
        draft.terms,
        tuple(draft.constants),
    )


def _parameters(node: fx.Node, module: nn.Module) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the inputs of an entropy model besides latents: scales, and others, which may be added to symbols."""
    given = arguments_of(node, module)
    nodes = {name: value for name, value in given.items() if isinstance(value, fx.Node) and name != "inputs"}
    return [n for name, n in nodes.items() if name == "scales"], [
        n for name, n in nodes.items() if name != "scales"
    ]


def _likelihoods_of_others(
    gm: fx.GraphModule, called: dict[fx.Node, nn.Module], sizes: set[fx.Node]
) -> list[fx.Node]:
    """Return the likelihoods among the outputs that are not computed by entropy models.

    Nodes that read only likelihoods of entropy models (a product with a mask, say) count as computed by these.
    """
    harmless = {*sizes}
    for node in gm.graph.nodes:
        coder = called.get(node.args[0]) if node.target is operator.getitem else None
        if isinstance(coder, EntropyModel | LatentCodec):
            found = node.args[1] == (1 if isinstance(coder, EntropyModel) else "likelihoods")
        elif isinstance(called.get(node), LatentCodec):
            found = True
        else:
            found = node.op not in ("placeholder", "output") and harmless.issuperset(node.all_input_nodes)
        if found:
            harmless.add(node)
    output = next(iter(reversed(gm.graph.nodes))).args[0]
    likelihoods: list[fx.Node] = []
    fx.map_arg(output["likelihoods"] if isinstance(output, dict) else output, likelihoods.append)
    return [node for node in likelihoods if node not in harmless]


def compares_scales(module: nn.Module) -> bool:
    """Say whether ``module`` is an entropy model that chooses CDFs by comparing scales with a table."""
    own = getattr(type(module), "build_indexes", None) is not GaussianConditional.build_indexes
    return not own and not isinstance(module, GaussianMixtureConditional)


def _check_conditional(draft: Draft, name: str, module: GaussianConditional) -> None:
    if not compares_scales(module):
        draft.stop(
            name, f"({type(module).__name__}) chooses CDFs otherwise than by comparing scales with a table"
        )


def _enter(draft: Draft, name: str, codec: LatentCodec) -> None:
    """Follow the networks on the path inside the latent codec ``codec``, and inside the codecs that it contains."""
    for path, module in codec.named_modules(prefix=name):
        if isinstance(module, EntropyBottleneck):
            draft.priors[path] = None
        if isinstance(module, GaussianConditional):
            _check_conditional(draft, path, module)
        if isinstance(module, LatentCodec):
            if type(module) not in _NETWORKS:
                draft.stop(
                    path, f"({type(module).__name__}) is a latent codec whose way of coding is not known"
                )
                continue
            for key in _NETWORKS[type(module)]:
                for network_path, network in _networks(f"{path}.{key}", module.get_submodule(key)):
                    _follow_network(draft, network_path, network)


def _networks(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleDict):
        yield from ((f"{path}.{key}", network) for key, network in module.items())
    else:
        yield path, module


def _follow_network(draft: Draft, path: str, network: nn.Module) -> None:
    tracer = NetworkTracer()
    if tracer.is_leaf_module(network, path):
        draft.note_module(path, network)
        return
    try:
        graph = tracer.trace(network)
    except Exception as error:  # a user's network may do anything
        draft.stop(path, f"cannot be traced ({error})")
        return
    walk = Walk(draft, network, graph, state=network, prefix=f"{path}.", inputs=True)
    walk.follow_means(next(iter(reversed(graph.nodes))).all_input_nodes)


def _check_calls_elsewhere(draft: Draft, called: dict[fx.Node, nn.Module], on_path: set[fx.Node]) -> None:
    """Refuse modules that are called on the path and elsewhere, where fixed-point numbers would be wrong."""
    names = {id(module): name for name, module in (draft.layers | draft.activations).items()}
    for node, module in called.items():
        if node not in on_path and id(module) in names:
            draft.stop(node.name, f"calls {names[id(module)]!r} off the entropy path as well; give it a copy")


def _codes_in_order(model: Any, masked: list[str]) -> bool:
    """Say whether ``model`` codes in the loops of CompressAI's mbt2018, around its one masked convolution."""
    loops = JointAutoregressiveHierarchicalPriors
    names = ("_compress_ar", "_decompress_ar")
    same = isinstance(model, loops) and all(getattr(type(model), n) is getattr(loops, n) for n in names)
    return same and masked == ["context_prediction"]
