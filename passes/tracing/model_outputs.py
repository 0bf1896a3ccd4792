"""Run a model on images, and explain the error if it cannot, or if its output is not CompressAI's."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmpq_fx.errors import FmpqError

_CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")


def output_of(model: Callable[[Tensor], Any], x: Tensor) -> dict[str, Any]:
    """Return the checked output of ``model`` for the images ``x`` (B, C, H, W).

    Raises:
        FmpqError: there is too little memory, the model fails on such images, or its output is not CompressAI's.
    """
    try:
        output: dict[str, Any] = model(x)
    except (RuntimeError, MemoryError, AssertionError) as error:
        raise FmpqError(_failure(error, x)) from error
    check_output(output)
    if output["x_hat"].shape != x.shape:
        raise FmpqError(
            f"the model makes {tuple(output['x_hat'].shape)} from images {tuple(x.shape)}: their height and "
            "width must be multiples of its stride, and at least that large; crop or pad them"
        )
    return output


def check_output(output: Any) -> None:
    """Check that ``output`` is a dict with a reconstruction and likelihoods.

    Raises:
        FmpqError: ``output`` is something else.
    """
    likelihoods = output.get("likelihoods") if isinstance(output, dict) else None
    if isinstance(likelihoods, dict) and likelihoods and "x_hat" in output:
        return
    what = (
        f"a dict with the keys {sorted(map(str, output))}"
        if isinstance(output, dict)
        else type(output).__name__
    )
    raise FmpqError(
        f"the model's output has no likelihoods: it is {what}; the RD loss needs a dict with 'x_hat', the "
        "reconstruction, and 'likelihoods', a dict of the likelihoods of all latents, as CompressAI's models return it"
    )


def wrong_channels(wanted: int, given: int) -> str:
    """Return the error text for a model that takes images of ``wanted`` channels and was ``given`` others."""
    return (
        f"the model takes images of {wanted} channel{'s' * (wanted != 1)}, and these have {given}\n"
        f"Pass tensors (…, {wanted}, H, W), float in [0, 1]; image files, and the photographs that prepare() takes "
        "where none are given, have 3 channels."
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Say whether ``error``, or its cause, was raised because an allocation failed, on a CPU or a GPU."""
    failed = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    return failed or (error.__cause__ is not None and ran_out_of_memory(error.__cause__))


def _failure(error: BaseException, x: Tensor) -> str:
    """Return the error text for a model that raised ``error`` on the images ``x``, with what to do."""
    images = f"{len(x)} image{'s' * (len(x) != 1)} of {x.size(-1)} x {x.size(-2)}"
    if ran_out_of_memory(error):
        return (
            f"there is too little memory to run the model on {images}: {error}\n"
            "Pass smaller images (crops of 256 x 256 suit most models), a smaller memory=, so that less is kept "
            "beside it, or use a machine with more."
        )
    channels = _CHANNELS.search(str(error))
    if channels is not None and int(channels[2]) == x.size(1):
        return wrong_channels(int(channels[1]), x.size(1))
    return (
        f"the model cannot run on {images} and {x.size(1)} channels: {error}\n"
        "Images must have as many channels as the model takes, and be at least as large as its stride and a multiple "
        "of it; 256 x 256 suits most models."
    )
