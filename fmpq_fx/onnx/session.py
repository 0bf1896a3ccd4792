"""An ONNX graph that ONNX Runtime runs, as a module."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmpq_fx.onnx.graph import OPSET, package


@functools.cache
def products_overflow() -> bool:
    """Say whether ONNX Runtime multiplies 8-bit matrices inexactly here.

    It does on x64 processors without VNNI instructions, which add pairs of products in 16 bits.
    """
    helper, types = package("onnx").helper, package("onnx").TensorProto
    x = np.full((16, 64), 255, np.uint8)
    weight = package("onnx").numpy_helper.from_array(np.full((64, 16), 127, np.int8), "weight")
    ends = [
        helper.make_tensor_value_info(name, kind, (16, None))
        for name, kind in (("x", types.UINT8), ("y", types.INT32))
    ]
    product = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = helper.make_graph([product], "product", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    session = package("onnxruntime").InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    return bool((y != 255 * 127 * 64).any())


class Session(nn.Module):
    """Runs an ONNX graph; as a module, one with one input and one output.

    Args:
        model: the serialized graph.
        threads: that ONNX Runtime computes with; None is as many as torch does.
    """

    def __init__(self, model: bytes, threads: int | None = None):
        super().__init__()
        runtime = package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if products_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")  # exact, and slower
        # Threads that wait without sleeping take the processor from torch, which runs the rest.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.arguments = model, threads
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return all outputs for ``inputs`` in the order of the graph, in float32 on the CPU."""
        arrays = [x.detach().cpu().float().contiguous().numpy() for x in inputs]
        found = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        return [torch.from_numpy(array) for array in found]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` (B, C, H, W), with its device and dtype."""
        return self.run([x])[0].to(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """Return itself: it has no state."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the graph; a session cannot be copied."""
        return Session, self.arguments
