"""Turn a rewritten graph into a codec of the model's own class, or into a checkpoint that stock CompressAI reads."""

import copy
import os
import warnings
from typing import Literal

import torch
from torch import fx, nn

from fmpq_fx.coding import wavefront
from fmpq_fx.coding.cdf_tables import update_tables
from fmpq_fx.coding.codec import AutoregressiveCodec, Codec, can_code, codec_of, with_settings
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import graph_note, plan_of
from fmpq_fx.passes.lower.entropy_path import EntropyPath, entropy_path
from fmpq_fx.passes.lower.integerize import integerize
from fmpq_fx.passes.swap import replace_modules
from fmpq_fx.quant import quantized_layers
from fmpq_fx.storage import fingerprint
from fmpq_fx.storage.files import replacing

Exact = bool | Literal["require"]


def convert(gm: fx.GraphModule, *, exact: Exact = True) -> nn.Module:
    """Return the model that ``gm`` was made from, with its quantized layers in place of the float ones.

    The networks that choose the CDFs of its latents compute in exact integer arithmetic. So its bitstreams decode on
    every machine, with any device, number of threads, memory layout, batch and library, in float32 or float64.

    Args:
        gm: the graph that :func:`fmpq_fx.prepare` or :func:`fmpq_fx.rewrite` returned, trained further or not. It is
            not modified, and shares nothing with the result.
        exact: True makes the entropy path exact; if an operation on it has no exact form, the path stays in floating
            point, with a warning, and with "require" it is an error. False keeps floating point: such a codec decodes
            reliably only in the same process on the same machine.

    Returns:
        a model of the user's own class, in evaluation mode, on the device of ``gm``. Its forward computes what
        ``gm`` does, up to the rounding of fixed-point numbers on the entropy path. If the class can code (CompressAI's
        can), the model is also a :class:`fmpq_fx.coding.codec.Codec`, which guards ``compress()`` and
        ``decompress()``. Its CDF tables are built from the present weights; but a graph from :func:`fmpq_fx.load`
        whose entropy models were not trained since keeps the tables of its file.

        Models of CompressAI's own classes are in channels-last layout, in which CPUs convolve faster.

        The coding loops of autoregressive models are replaced by exact ones. With ``exact=False`` they stay
        CompressAI's, which read the weight of the context prediction without calling the layer: they get the
        quantized weight, but the layer's input stays float. The memory layout is then unchanged.

    Raises:
        FmpqError: ``gm`` carries no plan, its model cannot be copied, or ``exact="require"`` and an operation on the
            entropy path has no exact form.
        ValueError: ``exact`` is none of the three.
    """
    return with_exact_path(quantized_model(gm), entropy_path(gm), exact)


def quantized_model(gm: fx.GraphModule) -> nn.Module:
    """Return the model that ``gm`` was made from, quantized, with the CDF tables of its present weights.

    Raises:
        FmpqError: ``gm`` carries no plan, or its model cannot be copied.
    """
    plan_of(gm)
    twin = copy.deepcopy(gm).eval()
    # Where the graph was moved to; that does not move what only the model has.
    model: nn.Module = graph_note(twin).model.eval().to(next(twin.parameters()).device)
    replace_modules(
        model, {model.get_submodule(site): layer for site, layer in quantized_layers(twin).items()}
    )
    # Tables of a file are kept: computed here, they might differ from those of the machine that wrote the file.
    if graph_note(gm).tables_of != fingerprint.of_entropy_models(model):
        update_tables(model)
    return model


def with_exact_path(model: nn.Module, path: EntropyPath, exact: Exact) -> nn.Module:
    """Return the quantized ``model`` as a codec, with its entropy ``path`` in exact arithmetic as ``exact`` says.

    A model whose class cannot code stays of its class; its path is made exact too.
    """
    if exact not in (True, False, "require"):
        raise ValueError(f'exact is {exact!r}; pass True, False or "require"')
    if not exact:
        return codec_of(model) if can_code(model) else model
    # Other people's classes may view activations in ways that this layout does not allow.
    if type(model).__module__.partition(".")[0] == "compressai":
        model.to(memory_format=torch.channels_last)
    try:
        if path.in_order:
            wavefront.check(model)
        integerize(model, path)
    except FmpqError as error:
        if exact == "require":
            raise FmpqError(
                f"the CDFs of {type(model).__name__} cannot be chosen exactly: {error}"
            ) from error
        warnings.warn(
            f"{type(model).__name__} keeps floating point on the way to its CDFs, so that its bitstreams may not "
            f"decode on other machines: {error}",
            stacklevel=3,
        )
        return codec_of(model) if can_code(model) else model
    if not can_code(model):
        return model
    return with_settings(codec_of(model, AutoregressiveCodec if path.in_order else Codec), exact=True)


def export_checkpoint(gm: fx.GraphModule, path: str | os.PathLike[str]) -> None:
    """Write the quantized weights, dequantized, as a state dict that the float model's class loads.

    A stock CompressAI reads it (``python -m compressai.utils.eval_model checkpoint``) and computes with the
    quantized weights; activations are float there. GDN's gamma goes back through its reparametrization, which
    changes it by rounding errors of float32.

    Args:
        gm: a rewritten graph.
        path: the file, ``{"state_dict": ...}`` as ``torch.save`` writes it, with CDF tables.

    Raises:
        FmpqError: ``gm`` carries no plan.
        FileNotFoundError: there is no such folder.
    """
    model = quantized_model(gm)
    layers = quantized_layers(model).values()
    for layer in layers:
        layer.set_integers(layer.integers)  # the float weight becomes the dequantized one
    replace_modules(model, {layer: layer.layer for layer in layers})
    with replacing(path) as file:
        torch.save({"state_dict": model.state_dict()}, file)
