"""Make every operation of a graph out-of-place, so that the value of a node never changes once computed.

The sensitivity pass keeps the values of all nodes and re-runs parts of the graph on them: an in-place ReLU
would spoil the kept value of the node before it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError


def functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite in-place operations as out-of-place ones, in ``gm`` itself, which is returned.

    Modules with an ``inplace`` flag lose it, ``clamp_`` becomes ``clamp``, and ``relu(x, inplace=True)`` loses
    the argument. (``+=`` is recorded as ``+`` by fx itself.) What reads the overwritten value afterwards reads
    the result. What nothing reads is removed.

    Raises:
        FmpqError: an operation has no out-of-place form.
    """
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    for node in order:
        if _make_out_of_place(gm, node):
            _redirect_later_users(node, order)
    for module in gm.modules():  # also those inside opaque modules, which must leave their input alone
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    gm.graph.eliminate_dead_code()  # not earlier: the result of an in-place operation need not be read
    gm.graph.lint()
    gm.recompile()
    return gm


def _make_out_of_place(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Change ``node`` to the out-of-place form; say whether it had been in-place."""
    if node.op == "call_module":
        return getattr(gm.get_submodule(str(node.target)), "inplace", False) is True
    if node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if node.op not in ("call_method", "call_function") or not name.endswith("_") or name.endswith("__"):
        return False
    node.target = _out_of_place(node, name.removesuffix("_"))
    return True


def _out_of_place(node: fx.Node, name: str) -> Any:
    """Return what to call instead of the target of ``node``, whose out-of-place form would have ``name``."""
    if node.op == "call_method" and callable(getattr(Tensor, name, None)):
        return name
    function = getattr(torch, name, None) or getattr(F, name, None)
    if node.op == "call_function" and function is not None:
        return function
    raise FmpqError(
        f"{node.format_node()} writes to its argument and has no out-of-place form; in the model's forward, "
        "compute a new tensor instead"
    )


def _redirect_later_users(node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Let what runs after ``node`` and reads the value it overwrote read its result instead."""
    overwritten = node.args[0] if node.args else node.kwargs.get("input")
    if isinstance(overwritten, fx.Node):
        overwritten.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
