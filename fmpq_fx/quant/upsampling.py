"""Transposed convolutions with few outputs, as convolutions, which CPUs compute in half the time.

The last layer of most synthesis transforms makes three channels. Libraries compute 16 at once, so that a transposed
convolution does as much for 3 channels as for 16. A convolution at the resolution of the input computes the 2 x 2
sub-positions of 3 channels as 12.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmpq_fx.quant.calls import CalledAlike
from fmpq_fx.quant.sub_positions import convolve, kernels_of, surplus_of, work_together

_MOST_WORK = 0.5
"""The most work of the convolution, as a part of the transposed one's. Some processors compute only 8 channels at once,
so that it may be twice as much there."""


def is_faster_lowered(layer: nn.ConvTranspose2d) -> bool:
    """Say whether a CPU computes ``layer`` faster as a convolution."""
    rows, columns = layer.stride
    return (
        rows == columns > 1
        and work_together(layer) <= _MOST_WORK
        and not any(surplus_of(layer, axis) for axis in (0, 1))
    )


def conv_transpose2d(
    layer: nn.ConvTranspose2d, x: Tensor, weight: Tensor, output_size: list[int] | None = None
) -> Tensor:
    """Return what ``layer`` computes with another ``weight``, up to rounding, in the way that is fastest.

    Args:
        layer: the geometry and the bias.
        x: the input, (B, C, H, W) or (C, H, W).
        weight: the kernel, (in, out / groups, kH, kW).
        output_size: height and width of the output, where the geometry allows several.
    """
    if x.ndim == 4 and output_size is None and _convolves_well(x) and is_faster_lowered(layer):
        return _lowered(layer, x, weight)
    geometry: Any = layer  # mypy takes its attributes for those of any convolution
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    extra = geometry._output_padding(x, output_size, stride, padding, layer.kernel_size, 2, dilation)
    return F.conv_transpose2d(x, weight, layer.bias, stride, padding, extra, layer.groups, dilation)


def _convolves_well(x: Tensor) -> bool:
    # In float64, and without the library, torch makes a matrix with a column for each place.
    single = x.dtype.itemsize <= torch.float32.itemsize
    return x.device.type in ("cpu", "meta") and single and torch.backends.mkldnn.is_available()


def _lowered(layer: nn.ConvTranspose2d, x: Tensor, weight: Tensor) -> Tensor:
    stride, outputs = layer.stride[0], layer.out_channels
    (kernel,) = kernels_of(weight.transpose(0, 1), layer, together=True)
    bias = None if layer.bias is None else layer.bias.repeat(stride * stride)
    parts = convolve(x, kernel.weight, bias, kernel.pads, kernel.dilation)
    batch, _, height, width = parts.shape
    height, width = height * stride, width * stride
    apart: Tensor = parts.unflatten(1, (stride, stride, outputs))
    if parts.is_contiguous(memory_format=torch.channels_last):
        return apart.permute(0, 4, 1, 5, 2, 3).reshape(batch, height, width, outputs).permute(0, 3, 1, 2)
    return apart.permute(0, 3, 4, 1, 5, 2).reshape(batch, outputs, height, width)


class FastConvTranspose2d(CalledAlike):
    """A float transposed convolution that is computed as :func:`conv_transpose2d` does.

    Args:
        layer: the layer whose place it takes.
    """

    def __init__(self, layer: nn.ConvTranspose2d):
        super().__init__(layer)
        self.layer = layer

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Upsample ``x`` (B, C, H, W), to ``output_size`` (height, width) if given."""
        return conv_transpose2d(self.layer, x, self.layer.weight, output_size)
