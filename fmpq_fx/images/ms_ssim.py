"""MS-SSIM in strips, so that images of any size take little memory; in one piece, each pixel would take 250 bytes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales, from full size down by factors of two (Wang et al. 2003)."""

_WINDOW, _SIGMA = 11, 1.5  # taps and standard deviation of the Gaussian, pixels
_K1, _K2 = 0.01, 0.03

LEAST_SIDE = (_WINDOW - 1) * 2 ** (len(WEIGHTS) - 1) + 1
"""The shortest side that has all scales."""

_STRIP = 2**16  # pixels of a channel that are compared at once; they fit into a processor's caches


def ms_ssim(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """Return the multi-scale structural similarity of pairs of images, (B,) in float64, means over their channels.

    Args:
        x: (B, C, H, W), sides at least :data:`LEAST_SIDE`.
        y: the images to compare with, of the same shape.
        peak: the largest possible value, 255 for 8-bit images.
    """
    images, channels = x.shape[:2]
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    result = x.new_ones(len(x), dtype=torch.float64)
    for scale, weight in enumerate(WEIGHTS):
        luminance_and_contrast, contrast = _means(x, y, peak)
        last = scale == len(WEIGHTS) - 1
        result = result * _power(luminance_and_contrast if last else contrast, weight)
        if not last:
            x, y = (F.avg_pool2d(z, 2, padding=[side % 2 for side in z.shape[1:]]) for z in (x, y))
    return result.view(images, channels).mean(1)


def _power(similarity: Tensor, weight: float) -> Tensor:
    """Return ``similarity ** weight``; where ``similarity`` is not positive, 0 with the gradient 0, not infinity."""
    positive = similarity > 0
    return torch.where(positive, similarity, 1.0) ** weight * positive


def _means(x: Tensor, y: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    """Return the means of SSIM and of its second factor over all places of (channels, H, W), (channels,) each."""
    sums = x.new_zeros(2, len(x), dtype=torch.float64)
    for rows in _strips(x):
        sums = sums + torch.stack(_ssim(x[:, rows], y[:, rows], peak)).sum((2, 3), dtype=torch.float64)
    places = (x.size(1) - _WINDOW + 1) * (x.size(2) - _WINDOW + 1)
    ssim, contrast = sums / places
    return ssim, contrast


def _strips(x: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of ``x``, which overlap so that every window lies in exactly one."""
    last = x.size(1) - _WINDOW + 1
    step = max(1, _STRIP // x.size(2))
    for first in range(0, last, step):
        yield slice(first, min(first + step, last) + _WINDOW - 1)


def _ssim(x: Tensor, y: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    """Return SSIM and its second factor at each place of (C, H, W)."""
    offsets = torch.arange(_WINDOW, device=x.device, dtype=x.dtype) - _WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    moments = torch.cat((x, y, x * x, y * y, x * y))
    taps = (taps / taps.sum()).expand(len(moments), 1, 1, -1).contiguous()
    blurred = F.conv2d(F.conv2d(moments, taps.mT, groups=len(moments)), taps, groups=len(moments))
    mean_x, mean_y, square_x, square_y, product = blurred.chunk(5)
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    means = mean_x * mean_y
    squares = mean_x**2 + mean_y**2
    contrast = (2 * (product - means) + c2) / (square_x + square_y - squares + c2)
    return (2 * means + c1) / (squares + c1) * contrast, contrast
