"""The sub-positions of the output of a transposed convolution, and the ordinary convolutions that compute them.

A transposed convolution of stride S computes each of the S x S sub-positions of its output with a separate part of the
kernel: output t = S * q + r sees input q + e with tap k if S * e = r + padding - dilation * k. Each part is the kernel
of a convolution at the resolution of the input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 16
"""Output channels that libraries compute at once, so that fewer take as long."""


@dataclass(frozen=True)
class Kernel:
    """The convolution that computes one or all of the sub-positions of an output."""

    weight: Tensor  # (sub-positions * out, in / groups, kH, kW)
    dilation: tuple[int, int]
    # Places at the ends of columns and of rows, as for F.pad; negative ones crop.
    pads: tuple[int, int, int, int]


@dataclass(frozen=True)
class Together:
    """The geometry of one convolution whose outputs are all sub-positions, row by row."""

    stride: tuple[int, int]  # sub-positions along each axis
    # The taps of the transposed kernel, of one sub-position behind the other; that behind the last tap is a zero.
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    pads: tuple[int, int, int, int]  # see :class:`Kernel`

    def kernel(self, weight: Tensor) -> Tensor:
        """Return the kernel, (sub-positions * out, in, kH, kW), for that of the transposed one, (out, in, kH, kW)."""
        taken = _taken(F.pad(weight, (0, 1, 0, 1)), self.rows, self.columns)
        apart: Tensor = taken.unflatten(3, (self.stride[1], -1)).unflatten(2, (self.stride[0], -1))
        return apart.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def together_of(layer: nn.ConvTranspose2d) -> Together:
    """Return the one convolution for all sub-positions of the output of ``layer``, which has one group."""
    rows, columns = (_alike(_seen(layer, axis)) for axis in (0, 1))
    down, right = (
        tuple(tap for sub in subs for tap in sub.taps_or(size))
        for subs, size in zip((rows, columns), layer.kernel_size, strict=True)
    )
    return Together((len(rows), len(columns)), down, right, (*columns[0].pads, *rows[0].pads))


def kernels_of(weight: Tensor, layer: nn.ConvTranspose2d, together: bool) -> list[Kernel]:
    """Return the convolutions whose outputs, one behind the other, are all sub-positions of the output of ``layer``.

    Args:
        weight: the kernel of ``layer``, (out, in / groups, kH, kW).
        layer: its geometry.
        together: return one convolution, whose kernel has zeros where a sub-position sees less than others; ``layer``
            has one group. Else there is a convolution for each, row by row, with a kernel of zeros if it sees nothing.
    """
    if together:
        one = together_of(layer)
        return [Kernel(one.kernel(weight), (1, 1), one.pads)]
    rows, columns = (_seen(layer, axis) for axis in (0, 1))
    padded, (height, width) = F.pad(weight, (0, 1, 0, 1)), layer.kernel_size
    return [
        Kernel(
            _taken(padded, row.taps_or(height), column.taps_or(width)),
            (row.inputs.step, column.inputs.step),
            (*column.pads, *row.pads),
        )
        for row in rows
        for column in columns
    ]


def _taken(weight: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    for dim, taps in ((2, rows), (3, columns)):
        weight = weight.index_select(dim, torch.tensor(taps, device=weight.device))
    return weight


@dataclass(frozen=True)
class _Seen:
    """What a sub-position sees along one spatial dimension; all in taps or places."""

    inputs: range  # relative to its own place
    taps: tuple[int | None, ...]  # the tap of the transposed kernel that each meets; None is a zero
    more: int  # places beyond the size of the input; as many for all sub-positions of an axis

    @property
    def pads(self) -> tuple[int, int]:
        return -self.inputs[0], self.inputs[-1] + self.more

    def taps_or(self, zero: int) -> list[int]:
        """Return the taps, with ``zero`` in the place of None."""
        return [zero if tap is None else tap for tap in self.taps]


def _seen(layer: nn.ConvTranspose2d, axis: int) -> list[_Seen]:
    """Return what each sub-position sees along rows (``axis`` 0) or columns (1)."""
    stride, kernel, dilation = layer.stride[axis], layer.kernel_size[axis], layer.dilation[axis]
    found = []
    for sub in range(stride):
        offset = sub + int(layer.padding[axis])
        # A later tap of a transposed convolution meets an earlier input.
        taps = [k for k in reversed(range(kernel)) if (offset - dilation * k) % stride == 0]
        inputs = [(offset - dilation * k) // stride for k in taps] or [0]
        step = inputs[1] - inputs[0] if len(inputs) > 1 else 1
        more = -(-_excess(layer, axis) // stride)
        found.append(_Seen(range(inputs[0], inputs[-1] + 1, step), tuple(taps) or (None,), more))
    return found


def _alike(subs: list[_Seen]) -> list[_Seen]:
    """Return ``subs`` with the inputs that any of them sees or skips; taps that one does not have are None."""
    inputs = range(min(sub.inputs[0] for sub in subs), max(sub.inputs[-1] for sub in subs) + 1)
    met = [dict(zip(sub.inputs, sub.taps, strict=True)) for sub in subs]
    return [_Seen(inputs, tuple(map(taps.get, inputs)), subs[0].more) for taps in met]


def _excess(layer: nn.ConvTranspose2d, axis: int) -> int:
    """Return the outputs beyond the stride times the size of the input."""
    extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    return extent - layer.stride[axis] - 2 * int(layer.padding[axis]) + layer.output_padding[axis]


def surplus_of(layer: nn.ConvTranspose2d, axis: int) -> int:
    """Return how many places the sub-positions together have too many behind the end of the output."""
    return -_excess(layer, axis) % layer.stride[axis]


def work_together(layer: nn.ConvTranspose2d) -> float:
    """Return the work of one convolution, which multiplies zeros, as a part of that of one for each sub-position."""
    if layer.groups > 1:
        return math.inf
    blocks, blocks_together = (
        -(-count * layer.out_channels // _BLOCK) for count in (1, layer.stride[0] * layer.stride[1])
    )
    axes = [_seen(layer, axis) for axis in (0, 1)]
    apart = math.prod(sum(len(sub.taps) for sub in subs) for subs in axes)
    together = math.prod(len(_alike(subs)[0].taps) for subs in axes)
    return blocks_together * together / (blocks * apart)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pads: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int = 1,
) -> Tensor:
    """Return the convolution of ``x`` (B, C, H, W), of stride 1 and padded by zeros; see :class:`Kernel`."""
    left, right, top, bottom = pads
    padding = (top, left)
    if left != right or top != bottom or min(padding) < 0:
        x, padding = F.pad(x, pads), (0, 0)  # runtimes make it a part of the convolution
    return F.conv2d(x, weight, bias, 1, padding, dilation, groups)
