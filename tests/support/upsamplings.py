"""Transposed convolutions of any geometry, for property tests."""

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

Pair = tuple[int, int]


def pairs(low: int, high: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def upsamplings(draw: Any) -> tuple[nn.ConvTranspose2d, Tensor]:
    """Draw a layer and an input on which torch itself can run it."""
    stride, groups = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.integers(1, 3))
    kernel, padding, dilation = draw(pairs(1, 7)), draw(pairs(0, 7)), draw(pairs(1, 3))
    limits = [max(stride, dilation[i]) - 1 for i in (0, 1)]
    output_padding = tuple(draw(st.integers(0, limit)) for limit in limits)
    inputs, outputs, size = (
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(pairs(1, 9)),
    )
    for i in (0, 1):
        extent = dilation[i] * (kernel[i] - 1) + 1
        assume((size[i] - 1) * stride - 2 * padding[i] + extent + output_padding[i] > 0)
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.ConvTranspose2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        output_padding,
        groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    return layer.eval(), torch.randn(2, inputs, *size)
