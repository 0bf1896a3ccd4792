"""Digests of values, which tell whether two models, image batches or codecs are the same."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from compressai.entropy_models import EntropyModel
from torch import Tensor, nn

from fmpq_fx.quant import quantized_layers


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and the values of ``state``, in hexadecimal."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(name.encode())
        if value.numel():  # a view of no elements may have any strides
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def of_model(model: nn.Module) -> str:
    """Return a digest of the weights of ``model``: of its state without the tables that ``update()`` sets."""
    return digest(
        {
            name: value
            for name, value in model.state_dict().items()
            if not (_is_computed(name) or name.endswith("scale_table"))
        }
    )


def of_images(batches: Iterable[Tensor]) -> str:
    """Return a digest of ``batches``, (B, C, H, W) each, in their order."""
    return digest({f"{i:06} {tuple(x.shape)} {x.dtype}": x for i, x in enumerate(batches)})


def of_entropy_models(model: nn.Module) -> str:
    """Return a digest of the tensors from which CompressAI's ``update()`` computes the CDF tables of ``model``."""
    parts = {name: module for name, module in model.named_modules() if isinstance(module, EntropyModel)}
    return digest(
        {
            f"{name}.{key}": value
            for name, module in parts.items()
            for key, value in module.state_dict().items()
            if not _is_computed(key)
        }
    )


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in ("_quantized_cdf", "_cdf_length", "_offset")


def of_codec(codec: nn.Module) -> str:
    """Return a digest of all tensors that ``codec`` computes with, integers in the place of quantized weights."""
    layers = quantized_layers(codec)
    weights = {id(layer.layer.get_parameter(layer.weight_name)) for layer in layers.values()}
    state = {
        name: value for name, value in codec.state_dict(keep_vars=True).items() if id(value) not in weights
    }
    integers = {f"{site}.integers": layer.integers for site, layer in layers.items()}
    return digest({**state, **integers})
