"""Convolutions as matrix products, which only add up products, in any order.

A library may compute a convolution by Winograd or FFT, which multiply sums and fractions of the inputs. In a matrix
product every intermediate number is a sum of some of the products. So sums of integers are exact if the sum of all
magnitudes can be represented.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvProduct:
    """A convolution, by a column for each place and a matrix (groups, out / groups, in / groups * places)."""

    trailing = 2  # dimensions behind the channels

    def __init__(self, layer: nn.Conv2d):
        self.groups = layer.groups
        self.kernel = layer.kernel_size
        self.stride, self.dilation = layer.stride, layer.dilation
        # Left, right, top, bottom. torch also has these numbers if the padding was given by name.
        self.padding = list(layer._reversed_padding_repeated_twice)
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    @property
    def pointwise(self) -> bool:
        """Whether an output depends only on the inputs at its own place."""
        return self.kernel == (1, 1) == self.stride and not any(self.padding)

    def matrix(self, integers: Tensor) -> Tensor:
        """Return the matrix of ``integers`` (out, in / groups, places)."""
        return integers.reshape(self.groups, -1, integers[0].numel())

    def sums(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return the sums for ``x`` (B, C, H, W)."""
        if any(self.padding):
            x = F.pad(x, self.padding, self.padding_mode)
        seen = x.unflatten(1, (self.groups, -1))
        for axis in (0, 1):  # F.unfold makes the same columns, on CPUs several times slower
            extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            seen = seen.unfold(3 + axis, extent, self.stride[axis])[..., :: self.dilation[axis]]
        height, width = seen.shape[3:5]
        columns = seen.permute(0, 1, 2, 5, 6, 3, 4).reshape(len(x), self.groups, matrix.size(2), -1)
        sums: Tensor = torch.matmul(matrix, columns)
        return sums.reshape(len(x), -1, height, width)


class ConvTransposeProduct:
    """A transposed convolution, by a matrix (groups, out / groups * places, in / groups) and ``fold``."""

    trailing = 2
    pointwise = False

    def __init__(self, layer: nn.ConvTranspose2d):
        self.groups = layer.groups
        self.kernel = layer.kernel_size
        self.stride, self.dilation = layer.stride, layer.dilation
        self.padding, self.output_padding = layer.padding, layer.output_padding

    def matrix(self, integers: Tensor) -> Tensor:
        """Return the matrix of ``integers`` (out, in / groups, places), the outputs group by group."""
        apart = integers.unflatten(0, (self.groups, -1))
        rows: Tensor = apart.transpose(2, 3).flatten(1, 2).contiguous()
        return rows

    def sums(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return the sums for ``x`` (B, C, H, W)."""
        size = [
            (x.size(2 + i) - 1) * self.stride[i]
            - 2 * int(self.padding[i])
            + self.dilation[i] * (self.kernel[i] - 1)
            + self.output_padding[i]
            + 1
            for i in range(2)
        ]
        columns = torch.matmul(matrix, x.reshape(len(x), self.groups, matrix.size(2), -1)).flatten(1, 2)
        return F.fold(columns, size, self.kernel, self.dilation, self.padding, self.stride)  # type: ignore[arg-type]


class LinearProduct:
    """A linear layer, by a matrix (out, in)."""

    trailing = 0
    pointwise = False

    def __init__(self, layer: nn.Linear):
        del layer  # the matrix is enough

    def matrix(self, integers: Tensor) -> Tensor:
        """Return the matrix of ``integers`` (out, in, 1)."""
        return integers.flatten(1)

    def sums(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return the sums for ``x`` (…, in)."""
        return torch.matmul(x, matrix.T)


Product = ConvProduct | ConvTransposeProduct | LinearProduct


def product_of(layer: nn.Module) -> Product | None:
    """Return the product that the float ``layer`` computes, or None for a layer of another kind."""
    if isinstance(layer, nn.Conv2d):
        return ConvProduct(layer)
    if isinstance(layer, nn.ConvTranspose2d):
        return ConvTransposeProduct(layer)
    return LinearProduct(layer) if isinstance(layer, nn.Linear) else None
