"""Cut a graph into the parts that run between entropy coding steps, by its dataflow alone.

The values that entropy coding reads and writes divide a codec: images enter, latents are coded and decoded, an image
leaves. A part is the nodes that can be computed together from the same of these values. Names of attributes play no
role.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compressai.entropy_models import EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import fx

from fmpq_fx.quant import QuantizeLatent


@dataclass(frozen=True)
class Part:
    """One part of a graph: nodes that are computed together."""

    name: str  # its role: "analysis", "hyper_analysis", "hyper_synthesis", "synthesis", …; unique
    nodes: tuple[fx.Node, ...]  # in the order of the graph; constants are left out
    inputs: tuple[fx.Node, ...]  # values that it reads from outside
    outputs: tuple[fx.Node, ...]  # values that are read outside


def cut(gm: fx.GraphModule) -> tuple[Part, ...]:
    """Return the parts of ``gm`` in the order in which they can run.

    Nodes that lead neither to a latent nor to the reconstruction (a likelihood that is clamped, say) are in no part,
    nor are nodes that depend on no input, or only on its dtype and device.

    The roles: "analysis" reads the image, "synthesis" makes the reconstruction, "hyper_analysis" reads latents
    before they are coded. Three roles run in both encoder and decoder: "context_prediction" reads only the latents
    whose distribution it predicts, "entropy_parameters" reads these and others, and "hyper_synthesis" reads only
    others. A second part of the same role gets a number: "synthesis_2".
    """
    flow = _Flow(gm)
    groups: dict[fx.Node, fx.Node] = {}  # each node's group, named by its first node

    def group(node: fx.Node) -> fx.Node:
        while groups[node] is not node:
            node = groups[node]
        return node

    for node, sources in flow.sources.items():
        groups[node] = node
        for read in node.all_input_nodes:
            if read in groups and read not in flow.cuts and flow.sources[read] == sources:
                groups[group(node)] = group(read)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in groups:
        members.setdefault(group(node), []).append(node)

    taken: Counter[str] = Counter()
    parts = []
    # A part only reads values of earlier parts; so its last node comes after these.
    for nodes in sorted(members.values(), key=lambda nodes: flow.order[nodes[-1]]):
        inside = set(nodes)
        reads = [read for node in nodes for read in node.all_input_nodes]
        inputs = dict.fromkeys(r for r in reads if r not in inside and r not in flow.constants)
        outputs = [n for n in nodes if n in flow.cuts or any(u not in inside for u in flow.users_of(n))]
        role = flow.role(nodes, outputs)
        taken[role] += 1
        name = role if taken[role] == 1 else f"{role}_{taken[role]}"
        parts.append(Part(name, tuple(nodes), tuple(inputs), tuple(outputs)))
    return tuple(parts)


class _Flow:
    """The dependencies between the nodes of a graph."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self.order = {node: position for position, node in enumerate(gm.graph.nodes)}
        output = next(iter(reversed(gm.graph.nodes))).args[0]
        x_hat = output.get("x_hat") if isinstance(output, dict) else None
        self.x_hat: fx.Node | None = x_hat if isinstance(x_hat, fx.Node) else None
        # Results of entropy coding -> the latent that was coded.
        self.coded: dict[fx.Node, fx.Node | None] = {}
        for node in self.order:
            if self._codes(node):
                self.coded[node] = next(iter(node.all_input_nodes), None)
            elif _is_item(node) and node.args[0] in self.coded:
                self.coded[node] = self.coded[node.args[0]]
        self.needed = set(self._upstream())
        self.constants: set[fx.Node] = set()
        self.cuts = {
            node
            for node in self.needed
            if node is self.x_hat or any(self._codes(user) for user in node.users)
        }
        # The nearest values that a node can be computed from.
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.order:
            if node not in self.needed or node.op in ("placeholder", "output") or node in self.coded:
                continue
            reads = [read for read in node.all_input_nodes if read not in self.constants]
            if reads and not _is_type(node):
                self.sources[node] = frozenset().union(*map(self._source, reads))
            else:
                self.constants.add(node)
        self.predicted = self._predicted()

    def _codes(self, node: fx.Node) -> bool:
        kinds = EntropyModel | LatentCodec | QuantizeLatent
        return node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), kinds)

    def _upstream(self) -> Iterator[fx.Node]:
        """Yield the nodes of entropy coding, the reconstruction, and all nodes that these are computed from."""
        pending = [node for node in self.order if self._codes(node)]
        pending += [self.x_hat] if self.x_hat is not None else []
        seen = set(pending)
        while pending:
            node = pending.pop()
            yield node
            fresh = set(node.all_input_nodes) - seen
            seen |= fresh
            pending += fresh

    def _source(self, read: fx.Node) -> frozenset[fx.Node]:
        outside = read.op == "placeholder" or read in self.coded or read in self.cuts
        return frozenset([read]) if outside else self.sources[read]

    def users_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the users of ``node`` that lead to a latent or to the reconstruction."""
        return [user for user in node.users if user in self.needed]

    def role(self, nodes: list[fx.Node], outputs: list[fx.Node]) -> str:
        """Return the role of the part that consists of ``nodes``."""
        sources = self.sources[nodes[0]]
        if any(source.op == "placeholder" for source in sources):
            return "analysis"
        if self.x_hat in outputs:
            return "synthesis"
        if any(source not in self.coded for source in sources):
            return "hyper_analysis"
        read = {self.coded[source] for source in sources}
        predicted = {latent for node in outputs for latent in self.predicted[node]}
        if not read & predicted:
            return "hyper_synthesis"
        return "context_prediction" if read == predicted else "entropy_parameters"

    def _predicted(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """Return for each node the latents whose distribution it is, or leads to."""
        predicted: dict[fx.Node, frozenset[fx.Node]] = {}
        # From last to first, so that the latents of all users are known, and each node is visited once.
        for node in reversed(self.sources):
            found: set[fx.Node] = set()
            for user in self.users_of(node):
                latent = self.coded.get(user)
                if latent is not None and latent is not node:
                    found.add(latent)
                else:
                    found |= predicted.get(user, frozenset())
            predicted[node] = frozenset(found)
        return predicted


def _is_item(node: Any) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _is_type(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] in ("dtype", "device")
