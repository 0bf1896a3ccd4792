"""What an ONNX graph is put together with: names, constants, weights as integers, and the packages that it needs."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError

OPSET = 21
"""The first with 4-bit tensors; ONNX 1.16 and ONNX Runtime 1.18 have it."""

Array = NDArray[Any]


def package(name: str) -> Any:
    """Return the optional package ``name``, "onnx" or "onnxruntime".

    Raises:
        FmpqError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FmpqError(
            f"this needs {name}, which cannot be imported ({error}); pip install 'fmpq-fx[onnx]'"
        ) from error


def checked_opset(opset: int) -> int:
    """Return ``opset`` if the graphs can be written in it.

    Raises:
        FmpqError: it is too old, or newer than the installed onnx.
    """
    newest: int = package("onnx").defs.onnx_opset_version()
    if opset < OPSET:
        raise FmpqError(
            f"opset {opset} is too old: 4-bit weights need opset {OPSET} (ONNX 1.16, ONNX Runtime 1.18) or a newer one"
        )
    if opset > newest:
        raise FmpqError(
            f"the installed onnx knows opsets up to {newest}; {opset} was asked for, pass a lower one"
        )
    return opset


@dataclass
class OnnxGraph:
    """An ONNX graph that is being put together."""

    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)  # values (B, C, H, W) that exist as (B, H, W, C), too
    by_place: set[str] = field(default_factory=set)  # values whose channels are ordered for a pixel shuffle
    names: dict[str, int] = field(default_factory=dict)  # how often each name was wanted
    values: dict[str, str] = field(default_factory=dict)  # names of values by the names of their nodes
    stored: dict[str, str] = field(default_factory=dict)  # what the integers of each site are stored in

    def name(self, wish: str) -> str:
        """Return a name like ``wish`` that nothing else has."""
        self.names[wish] = self.names.get(wish, 0) + 1
        return wish if self.names[wish] == 1 else self.name(f"{wish}.{self.names[wish]}")

    def add(self, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that."""
        return self.add_several(op, inputs, 1, name, **attributes)[0]

    def add_several(
        self, op: str, inputs: Sequence[str], count: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with ``count`` outputs and return these."""
        outputs = [self.name(name or op.lower()) for _ in range(count)]
        node = package("onnx").helper.make_node(op, list(inputs), outputs, name=outputs[0], **attributes)
        self.nodes.append(node)
        return outputs

    def constant(self, value: Any, name: str = "constant") -> str:
        """Add a constant, a tensor or what numpy makes an array of; int64 and float64 become what ONNX works with."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        unique = self.name(name)
        self.initializers[unique] = package("onnx").numpy_helper.from_array(
            np.ascontiguousarray(array), unique
        )
        return unique

    def is_scalar(self, x: str) -> bool:
        """Say whether ``x`` is a constant without dimensions."""
        return x in self.initializers and not self.initializers[x].dims

    def channels_last(self, x: str) -> str:
        """Return the value ``x`` (B, C, H, W) as (B, H, W, C)."""
        if x not in self.last:
            self.last[x] = self.add("Transpose", [x], perm=[0, 2, 3, 1])
        return self.last[x]

    def channels_first(self, x: str, name: str = "") -> str:
        """Return the value ``x`` (B, H, W, C) as (B, C, H, W); nothing is computed unless that is read."""
        first = self.add("Transpose", [x], name, perm=[0, 3, 1, 2])
        self.last[first] = x
        return first

    def integers(self, values: Array, bits: int, signed: bool, name: str) -> tuple[str, str]:
        """Add integer weights in the least container, and return their name and what they are stored in.

        The named value is int8, uint8 or, where 8 bits do not hold the integers, float32, which holds them exactly:
        ONNX Runtime has kernels that move those, and lacks some for 4 and 16 bits (Pad, say). It casts once, when it
        loads.
        """
        helper, types = package("onnx").helper, package("onnx").TensorProto
        if bits <= 4:
            unique, kind = self.name(name), "INT4" if signed else "UINT4"
            nibbles = values.astype(np.int8).flatten().view(np.uint8) & 15
            pairs = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
            packed = (pairs[::2] | pairs[1::2] << 4).tobytes()
            data_type = getattr(types, kind)
            self.initializers[unique] = helper.make_tensor(unique, data_type, values.shape, packed, raw=True)
            return self.add("Cast", [unique], f"{name}.int8", to=types.INT8), kind.lower()
        fits = bits <= (8 if signed else 7)
        dtype = np.int8 if fits else np.uint8 if bits <= 8 else np.int16
        stored = self.constant(values.astype(dtype), name)
        if dtype is np.int16:
            return self.add("Cast", [stored], f"{name}.float", to=types.FLOAT), "int16"
        return stored, np.dtype(dtype).name

    def pruned(self, outputs: Sequence[str]) -> None:
        """Remove nodes and constants that lead to none of ``outputs``."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = {name: value for name, value in self.initializers.items() if name in wanted}


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the tensor that ``node`` computed on the example image.

    Raises:
        FmpqError: it computed a number.
    """
    if "tensor_meta" not in node.meta:
        raise failed(node, "it computes a size, which is no tensor")
    return tuple(node.meta["tensor_meta"].shape)


def failed(node: fx.Node, what: str) -> FmpqError:
    """Return the error that says that ``node`` has no ONNX form."""
    module = f", module {str(node.target)!r}" if node.op == "call_module" else ""
    line = (node.stack_trace or "").strip().splitlines()
    where = f"\n  {' '.join(part.strip() for part in line)}" if line else ""
    return FmpqError(
        f"node {node.name!r}{module} has no ONNX form here: {what}. Nothing was written. Compute it with other "
        f"operations in the model's forward, or run the model in torch{where}"
    )
