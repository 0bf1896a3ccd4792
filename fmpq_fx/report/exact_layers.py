"""A table of the layers that compute in integers. It shows their arithmetic, and why that is exact."""

import torch
from tabulate import tabulate
from torch import nn

from fmpq_fx.exact import ExactLayer


def exact_table(codec: nn.Module) -> str:
    """Return what each layer on the way to the CDFs of ``codec`` computes with, as a text.

    Args:
        codec: what :func:`fmpq_fx.convert` or :func:`fmpq_fx.load_codec` returned.

    Returns:
        per layer the range of its input integers, and a bound of its sums: no input and no order of adding up exceeds
        it. Sums below 2^24 are taken in float32, which holds them exactly, if also no factor is above 2^8; the others
        in float64, which holds integers below 2^53, while sums stay below 2^48. If all CDFs are fixed, or none is
        exact, a sentence says that no layer computes so.
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
