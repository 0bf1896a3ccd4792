"""Find the module of a codec that computes each part of its graph, so that another backend can run in its place."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.passes.parts import Part, cut


class _Matcher(fx.Interpreter):
    """Finds the values of a graph that equal given tensors."""

    def __init__(self, gm: fx.GraphModule, tensors: Mapping[Any, Tensor]):
        super().__init__(gm)
        self.tensors = tensors
        self.equal: set[tuple[fx.Node, Any]] = set()  # a node, and the key of a tensor that it computed

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.equal |= {(n, key) for key, tensor in self.tensors.items() if torch.equal(value, tensor)}
        return value


@torch.no_grad()
def modules_of_parts(codec: nn.Module, gm: fx.GraphModule, x: Tensor) -> dict[str, tuple[str, str]]:
    """Return the module of ``codec`` that computes each part of ``gm``, and the value that it begins at.

    A module computes a part if, on an example, its output is the part's output and its input is a value in the part,
    bit for bit. Names only tell which module to try. Parts without such a module are left out.

    Args:
        codec: the converted ``gm``, on the CPU, in float32.
        gm: a rewritten graph. It is not modified.
        x: an image (1, C, H, W).

    Returns:
        {part: (module, node whose value is the module's input)}, all by name.
    """
    twin = copy.deepcopy(gm).cpu().float().eval()
    parts = [part for part in cut(twin) if len(part.outputs) == 1]
    candidates = {part.name: _module_name(part) for part in parts}
    tensors: dict[tuple[str, str], Tensor] = {}
    hooks = []
    for name in set(filter(None, candidates.values())):

        def note(_: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            if len(args) == 1 and isinstance(out, Tensor) and (name, "in") not in tensors:
                tensors[name, "in"], tensors[name, "out"] = args[0].clone(), out.clone()

        hooks.append(codec.get_submodule(name).register_forward_hook(note))
    try:
        codec(x)
    finally:
        for hook in hooks:
            hook.remove()
    matcher = _Matcher(twin, tensors)
    matcher.run(x)
    found = {}
    for part in parts:
        name = candidates[part.name]
        if (part.outputs[0], (name, "out")) in matcher.equal:
            # The last of these, since the module does not compute the nodes before it.
            entries = [
                node
                for node in (*part.inputs, *part.nodes)
                if (node, (name, "in")) in matcher.equal and not _inside(node, name)
            ]
            if entries:
                found[part.name] = (name, entries[-1].name)
    return found


def _inside(node: fx.Node, module: str) -> bool:
    return node.op == "call_module" and f"{node.target}.".startswith(f"{module}.")


def _module_name(part: Part) -> str:
    """Return the common beginning of the names of the modules that ``part`` calls; "" if there is none."""
    paths = [str(node.target).split(".") for node in part.nodes if node.op == "call_module"]
    common = []
    for atoms in zip(*paths, strict=False):
        if len(set(atoms)) > 1:
            break
        common.append(atoms[0])
    return ".".join(common)
