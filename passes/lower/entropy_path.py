"""Find the entropy path: the modules between the coded latents and the parameters that choose their CDFs.

What these compute must come out the same on the machine that decodes, to the last bit, or the image is destroyed.
The path is followed through the graph from the parameters of the conditional entropy models back to latents that
the decoder has, and through the networks inside CompressAI's latent codecs, which the graph keeps whole.
"""

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
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
from compressai.layers import MaskedConv2d
from compressai.models import JointAutoregressiveHierarchicalPriors
from torch import fx, nn

from fmpq_fx.exact.products import product_of
from fmpq_fx.passes.lower.sums import MOST_TERMS, NO_NUMBERS, SUMS, TermCounter, adds_fixed_point, float_layer
from fmpq_fx.passes.trace import LicTracer
from fmpq_fx.quant import QuantizedLayer, QuantizeLatent, quantized_class

# Fixed-point numbers go in and come out: these move, negate, compare, add. Where numbers are added, layers saturate
# so early that no sum leaves the range, beyond which float32 would round it.
_MODULES = (nn.ReLU, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.MaxPool2d, nn.ZeroPad2d, nn.Dropout)
_FUNCTIONS = (
    *(
        torch.cat,
        torch.concat,
        torch.chunk,
        torch.split,
        torch.stack,
        torch.reshape,
        torch.permute,
        torch.flatten,
    ),
    *(torch.squeeze, torch.unsqueeze, torch.transpose, torch.relu, torch.abs, torch.neg, torch.maximum),
    *(
        torch.minimum,
        torch.pixel_shuffle,
        F.relu,
        F.pixel_shuffle,
        operator.getitem,
        operator.neg,
        operator.abs,
        abs,
    ),
)
_METHODS = (
    *(
        "chunk",
        "split",
        "reshape",
        "view",
        "permute",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "transpose",
    ),
    *("contiguous", "clone", "detach", "narrow", "expand", "repeat", "relu", "abs", "neg"),
)
_NETWORKS: dict[type, tuple[str, ...]] = {
    HyperpriorLatentCodec: (),
    EntropyBottleneckLatentCodec: (),
    HyperLatentCodec: ("h_s",),
    GaussianConditionalLatentCodec: ("entropy_parameters",),
    CheckerboardLatentCodec: ("context_prediction", "entropy_parameters"),
    ChannelGroupsLatentCodec: ("channel_context",),
}
"""Which networks of a latent codec lie on the path."""


@dataclass(frozen=True)
class EntropyPath:
    """The names of the modules on the entropy path of a model, and what there cannot be computed exactly."""

    layers: tuple[str, ...]  # that multiply, in no particular order
    activations: tuple[str, ...]  # LeakyReLU
    priors: tuple[str, ...]  # entropy bottlenecks whose latents enter the path
    in_order: bool  # the model codes its latents one after the other, in the loops of mbt2018
    obstacles: tuple[str, ...]  # each names a node and says why it is none
    terms: int = 1  # as many outputs of layers are added up, at most, before another layer gets them


@dataclass
class _Draft:
    layers: dict[str, nn.Module] = field(default_factory=dict)
    activations: dict[str, nn.Module] = field(default_factory=dict)
    priors: dict[str, None] = field(default_factory=dict)
    obstacles: dict[str, None] = field(default_factory=dict)
    terms: int = 1

    def stop(self, node: str, reason: str) -> None:
        self.obstacles[f"{node!r} {reason}"] = None


def entropy_path(gm: fx.GraphModule) -> EntropyPath:
    """Return the entropy path of the traced or rewritten graph ``gm``; it is empty where all CDFs are fixed."""
    draft = _Draft()
    walk = _Walk(draft, gm, "")
    called = {n: gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"}
    for node, module in called.items():
        if isinstance(module, EntropyModel | LatentCodec):
            parameters = [*node.args[1:], *node.kwargs.values()]
            walk.follow(source for source in parameters if isinstance(source, fx.Node))
        if isinstance(module, GaussianConditional):
            _check_conditional(draft, str(node.target), module)
    _check_calls_elsewhere(draft, called, walk.seen)
    masked = [name for name, layer in draft.layers.items() if isinstance(float_layer(layer), MaskedConv2d)]
    in_order = _codes_in_order(gm.meta["model"], masked)
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
    )


class _Walk:
    """Follows a graph against its direction and notes what it meets.

    Args:
        draft: where it notes it.
        root: has the modules that the graph calls.
        prefix: what comes before their names.
        inputs: whether the graph's inputs are what the decoder has.
    """

    def __init__(self, draft: _Draft, root: nn.Module, prefix: str, inputs: bool = False):
        self.draft, self.root, self.prefix, self.inputs = draft, root, prefix, inputs
        self.seen: set[fx.Node] = set()
        self.terms = TermCounter(root)

    def follow(self, ends: Iterable[fx.Node]) -> None:
        """Visit ``ends`` and all that they are computed from, up to coded latents."""
        todo = list(ends)
        while todo:
            node = todo.pop()
            if node not in self.seen:
                self.seen.add(node)
                todo += node.all_input_nodes if self._goes_on(node) else []

    def _goes_on(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            name = str(node.target)
            return _note_module(self.draft, self.prefix + name, self.root.get_submodule(name))
        if node.op == "placeholder" and self.inputs:
            return False
        if node.op not in ("call_function", "call_method"):
            self.draft.stop(node.name, "is not computed from coded latents")
            return False
        asked = node.args[1] if node.target is getattr else node.target
        if asked in NO_NUMBERS:
            return False
        if asked in (*_FUNCTIONS, *_METHODS):
            return True
        if asked in SUMS and adds_fixed_point(node):
            return self._note_sum(node)
        self.draft.stop(node.name, f"({node.format_node()}) has no exact form")
        return False

    def _note_sum(self, node: fx.Node) -> bool:
        terms = self.terms(node)
        if terms > MOST_TERMS:
            what = "latents themselves" if terms == math.inf else f"{terms} outputs of layers"
            self.draft.stop(node.name, f"({node.format_node()}) adds up {what}; put a convolution before it")
            return False
        self.draft.terms = max(self.draft.terms, int(terms))
        return True


def _note_module(draft: _Draft, name: str, module: nn.Module) -> bool:
    """Note ``module``, which lies on the path; say whether the path goes on to its inputs."""
    if isinstance(module, EntropyBottleneck):
        draft.priors[name] = None
    if isinstance(module, EntropyModel | QuantizeLatent | LatentCodec):
        return False
    if isinstance(module, QuantizedLayer) or quantized_class(module) is not None:
        if product_of(float_layer(module)) is not None:
            draft.layers[name] = module
            return True
    elif type(module) is nn.LeakyReLU:
        draft.activations[name] = module
        return True
    elif type(module) in _MODULES:
        return True
    draft.stop(name, f"({type(float_layer(module)).__name__}) has no exact form")
    return False


def _check_conditional(draft: _Draft, name: str, module: GaussianConditional) -> None:
    own = type(module).build_indexes is not GaussianConditional.build_indexes
    if own or isinstance(module, GaussianMixtureConditional):
        draft.stop(
            name, f"({type(module).__name__}) chooses CDFs otherwise than by comparing scales with a table"
        )


def _enter(draft: _Draft, name: str, codec: LatentCodec) -> None:
    """Follow the networks inside the latent codec ``codec`` on the path, and those of the codecs inside it."""
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


def _follow_network(draft: _Draft, path: str, network: nn.Module) -> None:
    tracer = LicTracer()
    if tracer.is_leaf_module(network, path):
        _note_module(draft, path, network)
        return
    try:
        graph = tracer.trace(network)
    except Exception as error:  # a user's network may do anything
        draft.stop(path, f"cannot be traced ({error})")
        return
    _Walk(draft, network, f"{path}.", inputs=True).follow(next(iter(reversed(graph.nodes))).all_input_nodes)


def _check_calls_elsewhere(draft: _Draft, called: dict[fx.Node, nn.Module], on_path: set[fx.Node]) -> None:
    """Refuse modules that are called on the path and elsewhere: there, fixed-point numbers would not do."""
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
