"""Modules that run ONNX graphs in a runtime, with the settings that make each runtime's integers exact."""

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmpq_fx.onnx.packages import OPSET, package

PRECISIONS = ("f32", "bf16")
"""OpenVINO's names of the types that it computes in what is not integer."""


class Session(nn.Module, ABC):
    """Runs an ONNX graph; called as a module, the graph must have one input and one output.

    Args:
        model: the serialized graph.
        threads: the number of threads of the runtime; None is as many as torch uses.
    """

    package = ""  # the runtime's package
    title = ""  # the runtime's name, for people

    def __init__(self, model: bytes, threads: int | None = None):
        super().__init__()
        self.arguments: tuple[Any, ...] = model, threads

    @classmethod
    def version(cls) -> str:
        """Return the version of the runtime.

        Raises:
            FmpqError: it is not installed.
        """
        version: str = package(cls.package).__version__
        return version.partition("-")[0]

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return all outputs for ``inputs`` in the order of the graph, in float32 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` (B, C, H, W), with its device and dtype."""
        return self.run([x])[0].to(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """Return the session itself: it has no state."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph and the options; the runtime's own session cannot be pickled."""
        return type(self), self.arguments


class OnnxRuntimeSession(Session):
    """Runs an ONNX graph in ONNX Runtime.

    Args:
        model: the serialized graph.
        threads: the number of threads of ONNX Runtime; None is as many as torch uses.
        providers: ONNX Runtime's names of its providers; the first that can compute an operation does.
    """

    package, title = "onnxruntime", "ONNX Runtime"

    def __init__(
        self, model: bytes, threads: int | None = None, providers: Iterable[str] = ("CPUExecutionProvider",)
    ):
        super().__init__(model, threads)
        runtime, asked = package("onnxruntime"), list(providers)
        if unknown := set(asked) - set(runtime.get_available_providers()):
            raise ValueError(
                f"providers are {asked}; this ONNX Runtime has {runtime.get_available_providers()}, not "
                f"{', '.join(sorted(unknown))}"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if _products_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")  # exact, but slower
        # Threads that wait without sleeping would take the processor from torch, which runs the other parts.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.arguments = model, threads, asked
        self.session = runtime.InferenceSession(model, options, providers=asked)
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return all outputs for ``inputs`` in the order of the graph, in float32 on the CPU."""
        found = self.session.run(None, dict(zip(self.inputs, map(_array, inputs), strict=True)))
        return [torch.from_numpy(np.asarray(array)) for array in found]


class OpenVinoSession(Session):
    """Runs an ONNX graph in OpenVINO, in float32 if its integers are inexact on this processor.

    Args:
        model: the serialized graph.
        threads: the number of threads of OpenVINO; None is as many as torch uses.
        precision: the type of operations that are not integer: "f32", or "bf16", which is faster on processors that
            have it.

    Raises:
        ValueError: there is no such ``precision``.
    """

    package, title = "openvino", "OpenVINO"

    def __init__(self, model: bytes, threads: int | None = None, precision: str = "f32"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; pass one of {', '.join(map(repr, PRECISIONS))}")
        super().__init__(model, threads)
        self.arguments = model, threads, precision
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads() if threads is None else threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        self.compiled = _compiled(_with_float_weights(model) if _convolutions_overflow() else model, options)

    @classmethod
    def version(cls) -> str:
        """Return the version of OpenVINO."""
        version: str = package("openvino").get_version()
        return version.partition("-")[0]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return all outputs for ``inputs`` in the order of the graph, in float32 on the CPU."""
        found = self.compiled.create_infer_request().infer([_array(x) for x in inputs])
        return [torch.from_numpy(array.copy()) for array in found.to_tuple()]


RUNTIMES: dict[str, type[Session]] = {cls.package: cls for cls in (OnnxRuntimeSession, OpenVinoSession)}


def _array(x: Any) -> Any:
    """Return an input, a tensor or a size, as an array; tensors become float32."""
    return x.detach().cpu().float().contiguous().numpy() if isinstance(x, Tensor) else np.array(x)


def _compiled(model: bytes, options: dict[str, Any]) -> Any:
    core = package("openvino").Core()
    return core.compile_model(core.read_model(model), "CPU", options)


def _with_float_weights(model: bytes) -> bytes:
    """Return a graph with its weights dequantized, so that OpenVINO does not use integer kernels."""
    onnx = package("onnx")
    loaded = onnx.load_from_string(model)
    held = {entry.name: entry for entry in loaded.graph.initializer}
    nodes = []
    for node in loaded.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in held:
            nodes.append(node)
            continue
        # The zero point is 0.
        weight, step = (onnx.numpy_helper.to_array(held[name]) for name in node.input[:2])
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        step = step.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])
        loaded.graph.initializer.append(
            onnx.numpy_helper.from_array(weight.astype(np.float32) * step, node.output[0])
        )
    del loaded.graph.node[:]
    loaded.graph.node.extend(nodes)
    serialized: bytes = loaded.SerializeToString()
    return serialized


@functools.cache
def _products_overflow() -> bool:
    """Say whether ONNX Runtime multiplies 8-bit matrices inexactly here.

    It does on x86-64 processors without VNNI instructions, which add pairs of products in 16 bits.
    """
    helper, types = package("onnx").helper, package("onnx").TensorProto
    weight = np.full((64, 16), 127, np.int8)
    product = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    model = _model([product], {"weight": weight}, (types.UINT8, types.INT32), (16, 64))
    session = package("onnxruntime").InferenceSession(model, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.full((16, 64), 255, np.uint8)})
    return bool((y != 255 * 127 * 64).any())


@functools.cache
def _convolutions_overflow() -> bool:
    """Say whether OpenVINO convolves 8-bit integers inexactly here, for the same reason; warn if it does."""
    helper, types = package("onnx").helper, package("onnx").TensorProto
    held = {
        "weight": np.full((64, 64, 3, 3), 127, np.int8),
        "step": np.float32(1),
        "zero": np.uint8(0),
        "steps": np.ones(64, np.float32),
        "zeros": np.zeros(64, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "steps", "zeros"], ["kernel"], axis=0),
        helper.make_node("Conv", ["rounded", "kernel"], ["y"]),
    ]
    shape = (1, 64, 9, 9)
    model = _model(nodes, held, (types.FLOAT, types.FLOAT), shape)
    found = _compiled(model, {"INFERENCE_PRECISION_HINT": "f32"})([np.full(shape, 255, np.float32)])[0]
    inexact = bool(np.abs(found / (255 * 127 * 64 * 9) - 1).max() > 1e-3)
    if inexact:
        warnings.warn(
            "OpenVINO's 8-bit integers are inexact on this processor, which has no VNNI instructions: it computes in "
            "float32 instead, which is slower",
            stacklevel=2,
        )
    return inexact


def _model(nodes: list[Any], held: dict[str, Any], kinds: tuple[int, int], shape: Sequence[int]) -> bytes:
    """Return the ONNX graph of ``nodes`` from "x" to "y"."""
    helper, numpy_helper = package("onnx").helper, package("onnx").numpy_helper
    ends = [
        [helper.make_tensor_value_info(name, kind, dims)]
        for name, kind, dims in zip("xy", kinds, (shape, [None] * len(shape)), strict=True)
    ]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        helper.make_graph(nodes, "test", *ends, constants),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )
    serialized: bytes = model.SerializeToString()
    return serialized
