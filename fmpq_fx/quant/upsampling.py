"""Transposed convolutions with few output channels, as convolutions, which CPUs compute in half the time.

The last layer of most synthesis transforms makes three channels. Libraries compute 16 at once, so that a transposed
convolution does as much for 3 channels as for 16. A convolution at the resolution of the input computes the 2 x 2
sub-positions of 3 channels as 12.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmpq_fx.quant.calls import CalledAlike
from fmpq_fx.quant.sub_positions import Together, convolve, surplus_of, together_of, work_together

_MOST_WORK = 0.5
"""The most work of the one convolution, as a part of that of one for each sub-position. Some processors compute only 8
channels at once, so that it may be twice as much there."""

_ONEDNN = torch.backends.mkldnn.is_available()
"""Whether CPUs convolve by oneDNN. Else torch makes a matrix with a column for each place, as it does in float64."""


class Upsampling:
    """The way to compute a transposed convolution that is likely the fastest. It is decided once.

    Args:
        layer: the geometry.
    """

    def __init__(self, layer: nn.ConvTranspose2d):
        rows, columns = layer.stride
        lowered = (
            rows == columns > 1
            and work_together(layer) <= _MOST_WORK
            and not any(surplus_of(layer, axis) for axis in (0, 1))
        )
        self.together: Together | None = together_of(layer) if lowered else None  # on CPUs

    def __call__(
        self, layer: nn.ConvTranspose2d, x: Tensor, weight: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        """Return what ``layer`` computes with another ``weight``, up to rounding.

        Args:
            layer: the layer, with its bias.
            x: the input, (B, C, H, W) or (C, H, W).
            weight: the kernel, (in, out / groups, kH, kW).
            output_size: height and width of the output, where the geometry allows several.
        """
        if self.together is not None and x.ndim == 4 and output_size is None and _convolves_well(x):
            return _lowered(self.together, layer.bias, x, weight)
        geometry: Any = layer  # mypy takes its attributes for those of any convolution
        stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
        extra = geometry._output_padding(x, output_size, stride, padding, layer.kernel_size, 2, dilation)
        return F.conv_transpose2d(x, weight, layer.bias, stride, padding, extra, layer.groups, dilation)


def _convolves_well(x: Tensor) -> bool:
    # Tensors without data tell how much memory a run on a CPU takes.
    return _ONEDNN and x.device.type in ("cpu", "meta") and x.dtype.itemsize <= torch.float32.itemsize


def _lowered(together: Together, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    (stride, _), outputs = together.stride, weight.size(1)
    bias = None if bias is None else bias.repeat(stride * stride)
    parts = convolve(x, together.kernel(weight.transpose(0, 1)), bias, together.pads, (1, 1))
    batch, _, height, width = parts.shape
    height, width = height * stride, width * stride
    # Not by F.pixel_shuffle, whose backward crashes with channels last (torch 2.14, on CPUs).
    apart: Tensor = parts.unflatten(1, (stride, stride, outputs))
    if parts.is_contiguous(memory_format=torch.channels_last) and not parts.is_contiguous():
        return apart.permute(0, 4, 1, 5, 2, 3).reshape(batch, height, width, outputs).permute(0, 3, 1, 2)
    return apart.permute(0, 3, 4, 1, 5, 2).reshape(batch, outputs, height, width).contiguous()


class FastConvTranspose2d(CalledAlike):
    """A float transposed convolution that is computed by :class:`Upsampling`.

    Args:
        layer: the layer whose place it takes.
    """

    def __init__(self, layer: nn.ConvTranspose2d):
        super().__init__(layer)
        self.layer, self.upsampling = layer, Upsampling(layer)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Upsample ``x`` (B, C, H, W), to ``output_size`` (height, width) if given."""
        return self.upsampling(self.layer, x, self.layer.weight, output_size)
