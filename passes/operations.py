"""The table of operations, which all passes read.

An operation has many spellings: ``torch.relu(x)``, ``F.relu(x)``, ``x.relu()``, ``x.relu_()`` and ``nn.ReLU()(x)``
are one row. A row says how the operation moves places, and what it does to exact numbers. A pass asks
:func:`operation_of` for the row of a node. About an operation without a row nothing is known.
"""

import builtins
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fmpq_fx.exact import ExactLeakyReLU


class Places(Enum):
    """From which places (rows and columns) of its inputs, (B, C, H, W), an operation computes a place of its output."""

    OWN = auto()  # the same place, in evaluation mode
    ALONG = auto()  # the same place if ``dim`` is the channels: tensors are joined or divided along ``dim``
    PICKED = auto()  # the places that an index selects
    SHUFFLED = auto()  # the one place whose channels become a block of places
    GATHERED = auto()  # all places of a block, which become channels
    WINDOW = auto()  # the places in a window
    PADDED = auto()  # the same place, counted from another first row and column
    ELSEWHERE = auto()  # any other place, or all places


class Numbers(Enum):
    """What an operation does to fixed-point numbers, which floats hold exactly (fmpq_fx.exact.fixed_point)."""

    KEPT = auto()  # results are numbers of the inputs or of the arguments, perhaps negated, or 0 or 1
    ADDED = auto()  # results are sums of one number of each input
    SCALED = auto()  # results are products, exact if one factor is a constant of few bits
    MADE = auto()  # results are 0, 1 or one of the arguments, whatever the inputs hold
    COUNTED = auto()  # results are sizes, types or devices, not numbers of the inputs
    ROUNDED = auto()  # results are rounded, in different ways on different machines


@dataclass(frozen=True)
class Operation:
    """One row of the table."""

    name: str
    places: Places
    numbers: Numbers
    # Names of arguments in their order, "" for one that holds no numbers; () is unknown.
    operands: tuple[str, ...] = ()
    why: str = ""  # the reason that it has no exact form


_IN_ITS_OWN_WAY = "each library rounds it in its own way"
_TOO_MANY = "it adds up too many numbers for their range"
_PAIR = ("input", "other")


def _rows(
    names: str, places: Places, numbers: Numbers, operands: tuple[str, ...] = (), why: str = ""
) -> dict[str, Operation]:
    """Return the rows of operations with equal traits; a slash stands between spellings of one operation."""
    rows: dict[str, Operation] = {}
    for spellings in names.split():
        first, *others = spellings.split("/")
        row = Operation(first, places, numbers, operands, why)
        rows |= dict.fromkeys((first, *others), row)
    return rows


_BY_NAME: dict[str, Operation] = {
    **_rows(
        "identity/contiguous/clone/detach/data to/type_as/float/double/cpu/cuda", Places.OWN, Numbers.KEPT
    ),
    **_rows("abs/absolute neg/negative relu relu6", Places.OWN, Numbers.KEPT),
    **_rows("maximum minimum", Places.OWN, Numbers.KEPT, _PAIR),
    **_rows("clamp/clip", Places.OWN, Numbers.KEPT, ("input", "min", "max")),
    **_rows("hardtanh", Places.OWN, Numbers.KEPT, ("input", "min_val", "max_val")),
    **_rows("where", Places.OWN, Numbers.KEPT, ("condition", "input", "other")),
    **_rows("masked_fill", Places.OWN, Numbers.KEPT, ("input", "mask", "value")),
    **_rows("add sub/subtract", Places.OWN, Numbers.ADDED, _PAIR),
    **_rows("mul/multiply div/divide/true_divide/truediv", Places.OWN, Numbers.SCALED, _PAIR),
    **_rows("leaky_relu", Places.OWN, Numbers.ROUNDED, why="as a module, nn.LeakyReLU, it has one"),
    **_rows("round floor ceil", Places.OWN, Numbers.ROUNDED, why="it may leave the range of its input"),
    **_rows("pow sqrt rsqrt square exp log log2 erf erfc", Places.OWN, Numbers.ROUNDED, why=_IN_ITS_OWN_WAY),
    **_rows("sigmoid tanh elu gelu mish silu softplus", Places.OWN, Numbers.ROUNDED, why=_IN_ITS_OWN_WAY),
    **_rows("hardswish selu prelu batch_norm", Places.OWN, Numbers.ROUNDED, why=_IN_ITS_OWN_WAY),
    **_rows("dropout", Places.OWN, Numbers.ROUNDED, why="it is random unless it is a module, nn.Dropout"),
    **_rows("cat/concat/concatenate chunk split/split_with_sizes", Places.ALONG, Numbers.KEPT),
    **_rows("getitem", Places.PICKED, Numbers.KEPT),
    **_rows("pixel_shuffle", Places.SHUFFLED, Numbers.KEPT),
    **_rows("pixel_unshuffle", Places.GATHERED, Numbers.KEPT),
    **_rows("max_pool2d", Places.WINDOW, Numbers.KEPT),
    **_rows("avg_pool2d", Places.WINDOW, Numbers.ROUNDED, why=_TOO_MANY),
    **_rows("pad", Places.PADDED, Numbers.KEPT, ("input", "", "", "value")),
    **_rows("replication_pad", Places.PADDED, Numbers.KEPT),
    **_rows("reflection_pad", Places.ELSEWHERE, Numbers.KEPT),
    **_rows("written_through", Places.ELSEWHERE, Numbers.KEPT, ("input", "value")),
    **_rows("set_item", Places.ELSEWHERE, Numbers.KEPT, ("input", "", "value")),
    **_rows("reshape view flatten unflatten squeeze unsqueeze stack", Places.ELSEWHERE, Numbers.KEPT),
    **_rows("permute transpose/swapaxes/T/mT movedim rearrange", Places.ELSEWHERE, Numbers.KEPT),
    **_rows("expand expand_as repeat tile repeat_interleave", Places.ELSEWHERE, Numbers.KEPT),
    **_rows("narrow select unbind index_select gather amax amin", Places.ELSEWHERE, Numbers.KEPT),
    **_rows("flip roll rot90 unfold tril triu", Places.ELSEWHERE, Numbers.KEPT),
    **_rows("mean sum prod matmul/mm/bmm einsum", Places.ELSEWHERE, Numbers.ROUNDED, why=_TOO_MANY),
    **_rows("softmax layer_norm", Places.ELSEWHERE, Numbers.ROUNDED, why=_IN_ITS_OWN_WAY),
    **_rows(
        "conv2d conv_transpose2d linear", Places.ELSEWHERE, Numbers.ROUNDED, why="as a module it has one"
    ),
    **_rows(
        "empty empty_like new_empty", Places.ELSEWHERE, Numbers.ROUNDED, why="what it holds is not defined"
    ),
    **_rows("zeros zeros_like new_zeros ones ones_like new_ones eye", Places.ELSEWHERE, Numbers.MADE),
    **_rows("full_like full new_full", Places.ELSEWHERE, Numbers.MADE, ("", "fill_value")),
    **_rows("size shape dim/ndim/ndimension numel/nelement len", Places.ELSEWHERE, Numbers.COUNTED),
    **_rows("dtype device layout is_cuda requires_grad", Places.ELSEWHERE, Numbers.COUNTED),
}
"""The table, by the names of functions and methods."""

_ACTIVATIONS = (
    nn.ELU,
    nn.Hardswish,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Tanh,
)
_MODULES: dict[type[nn.Module], str] = {
    **{kind: kind.__name__.lower() for kind in (*_ACTIVATIONS, nn.Softplus)},
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), "identity"),
    nn.BatchNorm2d: "batch_norm",
    nn.LeakyReLU: "leaky_relu negative_slope",
    ExactLeakyReLU: "leaky_relu negative_slope=slope",
    nn.Hardtanh: "hardtanh min_val max_val",
    nn.GELU: "gelu approximate",
    nn.PixelShuffle: "pixel_shuffle upscale_factor",
    nn.PixelUnshuffle: "pixel_unshuffle downscale_factor",
    nn.MaxPool2d: "max_pool2d kernel_size stride padding dilation",
    nn.AvgPool2d: "avg_pool2d kernel_size stride padding",
    **dict.fromkeys((nn.ZeroPad2d, nn.ConstantPad2d), "pad pad=padding value"),
    nn.ReplicationPad2d: "replication_pad pad=padding",
    nn.ReflectionPad2d: "reflection_pad pad=padding",
    nn.Flatten: "flatten start_dim end_dim",
    nn.Unflatten: "unflatten dim sizes=unflattened_size",
}
"""Modules that do one operation -> its name, and its arguments, which are attributes (``argument=attribute``)."""

_NUMBERS_OF_PYTHON = ("_operator", "math", "builtins")
_PACKAGES = ("einops", "fmpq_fx")
"""Packages whose functions are known by name; so are the layers of einops."""


def _spelled(words: Mapping[str, Operation]) -> dict[Any, Operation]:
    """Return the rows by the functions that have one of these names."""
    homes = (builtins, operator, F, torch)
    found = {getattr(home, word, None): row for word, row in words.items() for home in homes}
    others = (operator.concat, operator.iconcat)  # of lists
    return {f: row for f, row in found.items() if callable(f) and not isinstance(f, type) and f not in others}


_IN_PLACE = {f"{word}_": row for word, row in _BY_NAME.items() if f"{word}_" not in _BY_NAME}
_BY_FUNCTION = _spelled(_BY_NAME)
_BY_WRITING_FUNCTION = _spelled(_IN_PLACE | {f"i{word}": row for word, row in _BY_NAME.items()})


def operation_of(root: nn.Module, node: fx.Node) -> Operation | None:
    """Return the row of the operation of ``node``; None if it has no row.

    Layers with weights have no row: ``fmpq_fx.quant`` and ``fmpq_fx.exact`` describe them.

    Args:
        root: the module whose submodules the node calls.
        node: a node of a traced graph.
    """
    if node.op == "call_module":
        return operation_of_module(root.get_submodule(str(node.target)))
    target: Any = node.target
    if node.op == "call_method" or (target is getattr and len(node.args) > 1):
        name = str(target if node.op == "call_method" else node.args[1])
        return _BY_NAME.get(name) or _IN_PLACE.get(name)
    if node.op != "call_function":
        return None
    if str(getattr(target, "__module__", "")).partition(".")[0] in _PACKAGES:
        return _BY_NAME.get(target.__name__)
    return _BY_FUNCTION.get(target) or _BY_WRITING_FUNCTION.get(target)


def operation_of_module(module: nn.Module) -> Operation | None:
    """Return the row of the operation of ``module``; None if it has no row."""
    kind = type(module)
    if kind.__module__.startswith("einops."):
        return _BY_NAME.get(kind.__name__.lower())
    return _BY_NAME[_MODULES[kind].split()[0]] if kind in _MODULES else None


def arguments_of_module(module: nn.Module) -> dict[str, Any]:
    """Return the arguments, by name, that ``module`` gives to its operation besides the input."""
    _, *arguments = _MODULES.get(type(module), "none").split()
    return {a.partition("=")[0]: getattr(module, a.rpartition("=")[2]) for a in arguments}


def writes(node: fx.Node) -> bool:
    """Say whether ``node`` calls a function or a method that writes to its input."""
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _BY_WRITING_FUNCTION or node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))


def operands_of(root: nn.Module, node: fx.Node) -> list[Any] | None:
    """Return the arguments of ``node`` that hold numbers: nodes and plain numbers.

    None: it has an argument that the table does not know. Where the row names no operands, only nodes are operands.
    """
    operation = operation_of(root, node)
    if operation is None:
        return None
    if not operation.operands:
        return list(node.all_input_nodes)
    given = dict(zip(operation.operands, node.args, strict=False)) | dict(node.kwargs)
    if node.op == "call_module":
        given |= arguments_of_module(root.get_submodule(str(node.target)))
    known = operation.numbers not in (Numbers.ADDED, Numbers.SCALED) or given.keys() <= {*operation.operands}
    values = [given[name] for name in operation.operands if name and given.get(name) is not None]
    return values if known else None


def sizes(root: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values hold no numbers of an image: sizes, types, devices, and arithmetic on these."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        operation = operation_of(root, node)
        home = str(getattr(node.target, "__module__", ""))
        plain = home in _NUMBERS_OF_PYTHON or home.startswith("fmpq_fx")
        counts = operation is not None and operation.numbers is Numbers.COUNTED
        if counts or (plain and node.all_input_nodes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found
