"""The model file, ``.fmpq``: a quantized model at its real size, which codes in the same way on every machine.

It is a safetensors file (see :mod:`fmpq_fx.storage.container` for its version and checksum), without pickle:

==================  =============================================================================================
``weights.SITE``    the integers of a site, entropy-coded (:mod:`fmpq_fx.storage.weight_coder`)
``quantizers``      packed: steps of the weights and of the inputs, and zero points
``model``           packed: the float tensors of the state dict: biases, GDN's betas, the entropy models
``tables``          packed: the CDF tables of the entropy models
``words``           packed JSON: the plan, the history of fine-tuning, names, types and shapes of all tensors, and
                    the modules on the entropy path (their exact arithmetic follows from the rest)
==================  =============================================================================================

Its metadata identify the model: its class, and its name in CompressAI's zoo if the zoo can make it again.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.coding.conversion import Exact, quantized_model, with_exact_path
from fmpq_fx.errors import FmpqError
from fmpq_fx.history import History
from fmpq_fx.models.identity import Model, given, identity_of, made
from fmpq_fx.onnx.codec import BACKENDS, exported_with_sessions
from fmpq_fx.passes.annotation import annotate_graph, graph_note, plan_of
from fmpq_fx.passes.lower.entropy_path import EntropyPath, entropy_path
from fmpq_fx.passes.plan.tables import Plan
from fmpq_fx.passes.plan.widths import WIDTHS
from fmpq_fx.passes.rewrite import quantize_sites
from fmpq_fx.passes.swap import replace_modules
from fmpq_fx.pipeline import rewrite
from fmpq_fx.quant import QUANTIZERS, QuantizedLayer, quantized_layers
from fmpq_fx.storage import container, fingerprint, tensor_packing, weight_coder

_WEIGHTS_PER_BYTE = 256  # the most weights per byte of a file; a small forged file could demand all memory


def save(gm: fx.GraphModule, path: str | os.PathLike[str]) -> None:
    """Write the rewritten graph ``gm`` to ``path``, at its real size.

    Args:
        gm: a graph from :func:`fmpq_fx.prepare` or :func:`fmpq_fx.rewrite`, trained further or not.
        path: the file, usually with the suffix ``.fmpq``.

    Raises:
        FmpqError: ``gm`` carries no plan, its activations are not calibrated, the weight of a site is computed
            from others, or it is in half precision.
        FileNotFoundError: there is no such folder.
    """
    plan = plan_of(gm)
    _check_precision(gm)
    model = quantized_model(gm)  # with the CDF tables of the present weights
    layers = _checked_layers(model, plan)
    integers = {site: layer.integers for site, layer in layers.items()}
    quantizers = _quantizer_states(layers)
    replace_modules(model, {layer: layer.layer for layer in layers.values()})
    quantized = {id(layer.layer.get_parameter(layer.weight_name)) for layer in layers.values()}
    state = model.state_dict(keep_vars=True)
    weights = {name: value for name, value in state.items() if id(value) in quantized}
    tables = {name: value for name, value in state.items() if name.endswith(tensor_packing.TABLE)}
    others = {name: value for name, value in state.items() if name not in weights | tables}
    words = {
        "plan": json.loads(plan.to_json()),
        "history": _shortened(graph_note(gm).history),
        "entropy_path": entropy_path(gm).described(),
        "layouts": {site: list(values.shape) for site, values in integers.items()},
        "signed": {site: layer.signed for site, layer in layers.items()},
        "weights": {name: list(value.shape) for name, value in weights.items()},
        "quantizers": tensor_packing.described(quantizers),
        "model": tensor_packing.described(others),
        "tables": tensor_packing.described(tables),
    }
    data = {f"weights.{site}": _coded(layers[site], values) for site, values in integers.items()}
    data["quantizers"] = tensor_packing.packed(quantizers)
    data["model"] = tensor_packing.packed(others)
    data["tables"] = tensor_packing.packed_tables(tables)
    data["words"] = container.packed(json.dumps(words, separators=(",", ":")).encode())
    container.write(path, {"model": identity_of(model)}, data)


def load(path: str | os.PathLike[str], *, model: Model | None = None) -> fx.GraphModule:
    """Return the graph that :func:`save` wrote to ``path``, on the CPU and in evaluation mode.

    Its outputs are those of the saved graph, bit for bit, and it can be trained further. Its float weights are the
    dequantized ones.

    Args:
        path: the file.
        model: for a file whose model is not of CompressAI's zoo: a model of that class and size, with any weights,
            or a callable that makes one. It is not modified.

    Raises:
        FmpqError: the file is damaged, of another version or no model file, or its model cannot be made.
        Exception: any error that ``model`` raises when it is called.
    """
    held = container.read(path)
    own = given(model, path)
    with blaming(path):
        codec, words = _codec(held, own)
        layers = quantized_layers(codec)
        replace_modules(codec, {layer: layer.layer for layer in layers.values()})
        gm = rewrite(codec, plan_in(words))
        for site, layer in layers.items():
            gm.get_submodule(site).load_state_dict(layer.state_dict())
        history = words["history"]
        annotate_graph(
            gm,
            tables_of=fingerprint.of_entropy_models(codec),
            history=None if history is None else History.from_json(json.dumps(history)),
        )
        return gm


def load_codec(
    path: str | os.PathLike[str],
    *,
    model: Model | None = None,
    exact: Exact = True,
    backend: str = "torch",
    **options: Any,
) -> nn.Module:
    """Return the codec in the file ``path``: a model of its own class, quantized, ready to code.

    It is the codec that :func:`fmpq_fx.convert` returns for the saved graph, with the CDF tables of the file. Nothing
    is traced, so this is faster than :func:`load`.

    Args:
        path: the file.
        model: as for :func:`load`.
        exact: as for :func:`fmpq_fx.convert`.
        backend: "torch", or "onnxruntime" or "openvino" to run the transforms. Bitstreams are interchangeable.
        options: for the other backends, ``graphs``, ``threads``, ``providers`` of ONNX Runtime and ``precision`` of
            OpenVINO (:func:`fmpq_fx.onnx.codec.exported_with_sessions`).

    Raises:
        FmpqError, Exception: as for :func:`load`, :func:`fmpq_fx.convert` and the export.
        ValueError: there is no such ``backend``, or an argument is out of its range.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; pass one of {', '.join(map(repr, BACKENDS))}")
    held = container.read(path)
    own = given(model, path)
    with blaming(path):
        codec, words = _codec(held, own)
        codec = with_exact_path(codec, EntropyPath(**words["entropy_path"]), exact)
    if backend == "torch":
        return codec
    return exported_with_sessions(codec, lambda: load(path, model=model), path, backend=backend, **options)


@contextmanager
def blaming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name ``path`` in every error of the block, as FmpqError. A forged file may cause an error of any type."""
    try:
        yield
    except FmpqError as error:
        raise FmpqError(f"{path}: {error}") from error
    except Exception as error:
        raise FmpqError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _checked_layers(model: nn.Module, plan: Plan) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of ``model`` in the order of the plan."""
    layers = {}
    for site, bits in plan.bits.items():
        if bits is not None:
            layer = model.get_submodule(site)
            assert isinstance(layer, QuantizedLayer)
            if layer.input_quantizer is not None and layer.input_quantizer.observing:
                raise FmpqError(
                    f"the activations of {site!r} are not calibrated; save what prepare() returned"
                )
            layers[site] = layer
    return layers


def _check_precision(gm: fx.GraphModule) -> None:
    """Refuse half precision, in which integers times steps would not be the weights of the graph."""
    for name, parameter in gm.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < torch.float32.itemsize:
            raise FmpqError(f"{name} is {parameter.dtype}; save a graph in float32, gm.float(), or float64")


def _quantizer_states(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    return {
        f"{site}.{name}": value
        for site, layer in layers.items()
        for name, value in layer.state_dict().items()
        if name.startswith(QUANTIZERS)
    }


def _coded(layer: QuantizedLayer, integers: Tensor) -> bytes:
    quantizer = layer.weight_quantizer
    return bytes(weight_coder.encode(integers.cpu().long().numpy(), quantizer.low, quantizer.high))


def _shortened(history: History | None) -> Any:
    """Return the fields of ``history``, with its many losses rounded to four digits."""
    if history is None:
        return None
    return json.loads(replace(history, losses=tuple(float(f"{x:.4g}") for x in history.losses)).to_json())


def _codec(held: container.Container, own: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in the file with its quantized layers, and the "words" of the file."""
    words = json.loads(container.unpacked(held.data["words"]))
    plan, identity = plan_in(words), held.about["model"]
    dtype = tensor_packing.dtype_of(identity["dtype"])
    _check_sizes(words, held.size)
    state = tensor_packing.unpacked(held.data["model"], words["model"])
    state |= tensor_packing.unpacked_tables(held.data["tables"], words["tables"])
    state |= {name: torch.zeros(shape, dtype=dtype) for name, shape in words["weights"].items()}
    tensor_packing.check_tables(state)
    codec = made(identity, state, own).eval()

    quantizers = tensor_packing.unpacked(held.data["quantizers"], words["quantizers"])
    for site, layer in quantize_sites(codec, plan).items():
        for name, value in layer.state_dict().items():
            if name.startswith(QUANTIZERS):
                value.copy_(quantizers[f"{site}.{name}"])
        shape = layer.layout
        if list(shape) != words["layouts"][site]:
            raise FmpqError(
                f"the weights of {site!r} are {words['layouts'][site]}, those of the model {shape}"
            )
        low, high = layer.weight_quantizer.low, layer.weight_quantizer.high
        integers = weight_coder.decode(held.data[f"weights.{site}"], shape, low, high)
        layer.set_integers(torch.from_numpy(integers).to(dtype))
    return codec, words


def plan_in(words: dict[str, Any]) -> Plan:
    """Return the plan in the "words" of a file.

    Raises:
        FmpqError: it is no plan, or has impossible bits or clips.
    """
    plan = Plan.from_json(json.dumps(words["plan"]))
    for site, bits in (*plan.bits.items(), *plan.activation_bits.items()):
        if bits is not None and (type(bits) is not int or bits not in WIDTHS):
            raise FmpqError(f"{site!r} has {bits!r} bits")
    for site, clip in plan.clips.items():
        if not 0 < clip <= 1:
            raise FmpqError(f"{site!r} is clipped at {clip!r} of its range")
    if not plan.calibrated:
        raise FmpqError("its plan has no activation ranges")
    return plan


def _check_sizes(words: dict[str, Any], size: int) -> None:
    """Refuse a file that claims more weights than it can hold, before memory is asked for."""
    claimed = sum(math.prod(max(0, int(side)) for side in shape) for shape in words["weights"].values())
    if claimed > max(1_000_000, _WEIGHTS_PER_BYTE * size):
        raise FmpqError(f"a file of {size} bytes cannot hold {claimed} weights")
