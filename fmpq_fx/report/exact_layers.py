"""A table of the layers that compute in integers: in which arithmetic, and why that is exact."""

import torch
from tabulate import tabulate
from torch import nn

from fmpq_fx.exact import ExactLayer


def exact_table(codec: nn.Module) -> str:
    """Return what each layer on the way to the CDFs of ``codec`` computes with, as a text.

    Args:
        codec: what :func:`fmpq_fx.convert` or :func:`fmpq_fx.load_codec` returned.

    Returns:
        per layer the integers that come in, and the largest sum of the magnitudes of all products of an output:
        whatever the inputs, and in whatever order they are summed, nothing is larger. Below 2^24 float32 holds every
        integer, and does where also no factor is above 2^8; float64 holds those below 2^53, and sums stay below 2^48.
        "No layer" where all CDFs are fixed, or none is exact.
    """
    rows = [
        (
            name,
            layer.kind,
            " … ".join(str(int(end)) for end in layer.input_range.tolist()),
            f"{layer.bound} < 2^{layer.bound.bit_length()}",
            "float32" if layer.arithmetic is torch.float32 else "float64",
        )
        for name, layer in codec.named_modules()
        if isinstance(layer, ExactLayer)
    ]
    if not rows:
        return "No layer computes in exact integer arithmetic."
    headers = ["layer", "kind", "inputs", "largest sum", "summed in"]
    return tabulate(rows, headers, colalign=("left", "left", "right", "right", "left"), disable_numparse=True)
