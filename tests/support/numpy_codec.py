"""A second implementation of the exact layers: integers of NumPy where they fit into 64 bits, else Python's."""

from typing import Any

import numpy as np
import torch
from compressai.ans import RansDecoder
from torch import Tensor, nn

from fmpq_fx.coding.codec import AutoregressiveCodec
from fmpq_fx.exact import ExactLayer, ExactLeakyReLU
from fmpq_fx.exact.fixed_point import MOST, Rescaling
from fmpq_fx.exact.products import ConvProduct, ConvTransposeProduct
from fmpq_fx.passes.swap import shallow_copy, with_replaced

Integers = Any  # of NumPy: int64, or Python's in an object array


def rescaled(x: Integers, rescaling: Rescaling) -> Integers:
    """Return what ``rescaling`` makes of ``x`` (B, C, ...), as one multiply, add and shift, which need no pieces."""
    piece, kind = (24, object) if rescaling.wide else (0, np.int64)
    shape = (1, -1, *[1] * (x.ndim - 2)) if rescaling.multiplier.numel() > 1 else (1,) * x.ndim

    def column(values: list[int]) -> Integers:
        return np.array(values, dtype=kind).reshape(shape)

    multiplier = column([int(m) for m in rescaling.multiplier.flatten().tolist()])
    offset = column([int(o) << piece for o in rescaling.offset.flatten().tolist()])
    shift = column([piece + int(1 / unit).bit_length() - 1 for unit in rescaling.unit.flatten().tolist()])
    return (x.astype(kind) * multiplier + offset) >> shift


def fixed_point(x: Tensor) -> Integers:
    """Return the integers that the fixed-point numbers ``x`` are."""
    return np.rint(x.detach().double().numpy() * 4096).astype(np.int64).clip(-MOST, MOST)


def convolved(product: ConvProduct, matrix: Integers, x: Integers) -> Integers:
    """Convolve ``x`` (B, C, H, W)."""
    (kh, kw), (sh, sw), (dh, dw) = product.kernel, product.stride, product.dilation
    left, right, top, bottom = product.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    height, width = ((x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1)
    weight = matrix.reshape(product.groups, matrix.shape[1], -1, kh, kw)
    parts = np.split(x, product.groups, 1)
    out = []
    for group, part in zip(weight, parts, strict=True):
        sums = np.zeros((len(x), matrix.shape[1], height, width), dtype=np.int64)
        for row in range(kh):
            for column in range(kw):
                seen = part[:, :, row * dh :, column * dw :][:, :, ::sh, ::sw][:, :, :height, :width]
                sums += np.einsum("oi,bihw->bohw", group[:, :, row, column], seen)
        out.append(sums)
    return np.concatenate(out, 1)


def convolved_transposed(product: ConvTransposeProduct, matrix: Integers, x: Integers) -> Integers:
    """Convolve ``x`` (B, C, H, W) by a transposed convolution."""
    (kh, kw), (sh, sw), (dh, dw) = product.kernel, product.stride, product.dilation
    (ph, pw), (oh, ow) = map(int, product.padding), map(int, product.output_padding)
    rows, columns = (x.shape[2] - 1) * sh + 1, (x.shape[3] - 1) * sw + 1
    weight = matrix.reshape(product.groups, -1, kh, kw, matrix.shape[2])
    out = []
    for group, part in zip(weight, np.split(x, product.groups, 1), strict=True):
        sums = np.zeros(
            (len(x), len(group), rows + dh * (kh - 1) + oh, columns + dw * (kw - 1) + ow), dtype=np.int64
        )
        for i in range(kh):
            for j in range(kw):
                target = sums[:, :, i * dh : i * dh + rows : sh, j * dw : j * dw + columns : sw]
                target += np.einsum("oi,bihw->bohw", group[:, i, j], part)
        out.append(sums[:, :, ph : sums.shape[2] - ph, pw : sums.shape[3] - pw])
    return np.concatenate(out, 1)


class NumpyLayer(nn.Module):
    """An :class:`ExactLayer`; only its constants are read."""

    def __init__(self, layer: ExactLayer):
        super().__init__()
        self.layer = layer
        self.matrix = layer.matrix.double().numpy().astype(np.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` (B, C, H, W)."""
        layer, n = self.layer, fixed_point(x)
        if layer.input_rescaling is not None:
            n = rescaled(n, layer.input_rescaling)
        n = n.clip(*map(int, layer.input_range.tolist())).astype(np.int64)
        convolve: Any = convolved if isinstance(layer.product, ConvProduct) else convolved_transposed
        sums = convolve(layer.product, self.matrix, n)
        assert np.abs(sums).max() <= layer.bound
        out = rescaled(sums, layer.rescaling).clip(-layer.most, layer.most).astype(np.int64)
        return torch.from_numpy(out / 4096).to(x.dtype)


class NumpyLeakyReLU(nn.Module):
    """An :class:`ExactLeakyReLU`."""

    def __init__(self, layer: ExactLeakyReLU):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x``."""
        n = fixed_point(x)
        out = np.where(n < 0, rescaled(n, self.layer.rescaling), n).astype(np.int64)
        return torch.from_numpy(out / 4096).to(x.dtype)


class NumpyLoop:
    """The decoding loop of an autoregressive model: all places from what is known, of which it keeps the next few."""

    def _decompress_ar(self, string: bytes, y_hat: Tensor, params: Tensor, *sizes: int) -> None:
        height, width, kernel, padding = sizes
        model: Any = self
        prior, decoder = model.gaussian_conditional, RansDecoder()
        tables = prior.quantized_cdf.tolist(), prior.cdf_length.tolist(), prior.offset.tolist()
        decoder.set_stream(string + bytes(4096))
        known = y_hat[:, :, padding:-padding, padding:-padding]  # a view
        slope = kernel // 2 + 1
        for step in range(width + slope * (height - 1)):
            places = [(h, step - slope * h) for h in range(height) if 0 <= step - slope * h < width]
            rows, columns = map(list, zip(*places, strict=True)) if places else ([], [])
            found = model.entropy_parameters(torch.cat((params, model.context_prediction(known)), 1))
            scales, means = (part[:, :, rows, columns] for part in found.chunk(2, 1))
            indexes = prior.build_indexes(scales)
            symbols = decoder.decode_stream(indexes.flatten().tolist(), *tables)
            known[:, :, rows, columns] = torch.tensor(symbols).view(means.shape) + means


def in_numpy(codec: nn.Module) -> Any:
    """Return a copy of the exact ``codec`` whose entropy path, and coding loop, are those of this file."""
    new: dict[nn.Module, nn.Module] = {}
    for module in codec.modules():
        if isinstance(module, ExactLayer):
            new[module] = NumpyLayer(module)
        elif isinstance(module, ExactLeakyReLU):
            new[module] = NumpyLeakyReLU(module)
    twin = with_replaced(codec, new)
    if isinstance(codec, AutoregressiveCodec):
        return shallow_copy(twin, type("InNumpy", (NumpyLoop, type(codec)), {}))
    return twin
