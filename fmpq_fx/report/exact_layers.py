"""A table of the layers that compute in integers, with the ranges that make their sums exact."""

import torch
from tabulate import tabulate
from torch import nn

from fmpq_fx.exact import ExactLayer


def exact_table(codec: nn.Module) -> str:
    """Return a table of the arithmetic of each exact layer on the entropy path of ``codec``.

    Args:
        codec: a codec from :func:`fmpq_fx.convert` or :func:`fmpq_fx.load_codec`.

    Returns:
        for each layer the range of its input integers, and a bound of its sums, which no input and no order of
        additions exceeds. Sums below 2^24 with no factor above 2^8 are computed in float32, which holds them exactly;
        others in float64, which holds integers below 2^53 (sums stay below 2^48). Without such a layer, a sentence
        says so.
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
