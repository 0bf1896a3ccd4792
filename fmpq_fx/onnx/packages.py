"""Import optional packages, and check the opsets that they know."""

import importlib
from typing import Any

from fmpq_fx.errors import FmpqError

OPSET = 21
"""The first opset that dequantizes 16-bit integers; ONNX 1.16 and ONNX Runtime 1.18 have it."""


def package(name: str) -> Any:
    """Return the optional package ``name``: "onnx", "onnxscript", "onnxruntime" or "openvino".

    Raises:
        FmpqError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "openvino" if name == "openvino" else "onnx"
        raise FmpqError(
            f"this needs {name}, which cannot be imported ({error}); pip install 'fmpq-fx[{extra}]'"
        ) from error


def checked_opset(opset: int) -> int:
    """Return ``opset`` if the graphs can be written in it.

    Raises:
        FmpqError: the opset is too old, or newer than the installed onnx.
    """
    newest: int = package("onnx").defs.onnx_opset_version()
    if opset < OPSET:
        raise FmpqError(
            f"opset {opset} is too old: 16-bit weights need opset {OPSET} (ONNX 1.16, ONNX Runtime 1.18) or a newer one"
        )
    if opset > newest:
        raise FmpqError(
            f"the installed onnx knows opsets up to {newest}; {opset} was asked for, pass a lower one"
        )
    return opset
