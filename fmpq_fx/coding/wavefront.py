"""Coding loops of autoregressive models, in exact arithmetic, along wavefronts instead of place by place.

A masked convolution of k x k sees the rows above, and what is left of it in its own row. So place (h, w) depends on
none with the same w + (k // 2 + 1) * h, and all of those are computed together: 141 steps for 32 x 48 latents and
k = 5 instead of 1536. The symbols are coded in that order, since a decoder needs all of a step before the next.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmpq_fx.coding.string_coder import StringReader, Tables, encode, trimmed_tables
from fmpq_fx.errors import FmpqError
from fmpq_fx.exact.layers import ExactLayer
from fmpq_fx.exact.products import ConvProduct


class Context:
    """What an autoregressive model predicts the parameters of a latent with, from those before it.

    Args:
        conditional: the entropy model of the latents.
        prediction: the masked convolution.
        parameters: maps the parameters of the hyperprior and the prediction, one after the other, to scales and
            means; of every place for itself.

    Raises:
        FmpqError: they do something else than that.
    """

    def __init__(self, conditional: Any, prediction: ExactLayer, parameters: nn.Module):
        self.conditional, self.prediction, self.parameters = conditional, prediction, parameters
        product = prediction.product
        if not isinstance(product, ConvProduct) or {product.groups, *product.stride, *product.dilation} != {
            1
        }:
            raise FmpqError(
                "the context prediction has groups, strides or dilation, which no coding loop has"
            )
        if not all(m.product.pointwise for m in parameters.modules() if isinstance(m, ExactLayer)):
            raise FmpqError(
                "the entropy parameters depend on other places, which the coding loop does not have"
            )
        self.kernel = product.kernel
        matrix = prediction.matrix.view(prediction.matrix.size(1), -1, *product.kernel)
        middle = (self.kernel[0] // 2, self.kernel[1] // 2)
        places = [(row, column) for row in range(self.kernel[0]) for column in range(self.kernel[1])]
        self.taps = [place for place in places if place < middle]  # in the rows above, and left in the same
        if any(matrix[:, :, row, column].any() for row, column in places if (row, column) >= middle):
            raise FmpqError("the context prediction sees what is not decoded yet")
        self.matrix = torch.cat([matrix[:, :, row, column] for row, column in self.taps], 1)

    def scan(self, params: Tensor, height: int, width: int) -> "Scan":
        """Return the scan of ``height`` x ``width`` latents with ``params`` (1, C, height, width)."""
        return Scan(self, params, height, width)

    @property
    def tables(self) -> Tables:
        """The tables of the entropy model: trimmed, since the coder reads them anew in every step."""
        prior = self.conditional
        return trimmed_tables(prior.quantized_cdf, prior.cdf_length, prior.offset)


class Scan:
    """One image's latents while they become known; see :meth:`Context.scan`."""

    def __init__(self, context: Context, params: Tensor, height: int, width: int):
        self.context, self.params, self.height, self.width = context, params[0], height, width
        rows, columns = context.kernel
        self.stride = width + columns - 1
        prediction = context.prediction
        self.matrix = context.matrix.to(params.device)
        self.taps = torch.tensor(
            [row * self.stride + column for row, column in context.taps], device=params.device
        )
        channels = self.matrix.size(1) // len(context.taps)
        # What the convolution multiplies, 0 where nothing is known; padded, so that every tap is inside.
        self.known = prediction.matrix.new_zeros(channels, (height + rows - 1) * self.stride)
        self.corner = rows // 2 * self.stride + columns // 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows and the columns of the places of each step, (places,) each."""
        slope = self.context.kernel[1] // 2 + 1
        for step in range(self.width + slope * (self.height - 1)):
            least = max(0, -((self.width - 1 - step) // slope))
            rows = torch.arange(least, min(self.height - 1, step // slope) + 1, device=self.params.device)
            yield rows, step - slope * rows

    def predict(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and means of the latents at these places, (1, M, places, 1) each."""
        places = rows * self.stride + columns
        seen = self.known[:, self.taps[:, None] + places].transpose(0, 1).flatten(0, 1)
        sums = torch.matmul(self.matrix, seen)
        predicted = self.context.prediction.outputs(sums[None, :, :, None], self.params.dtype)
        given = self.params[None, :, rows, columns, None]
        scales, means = self.context.parameters(torch.cat((given, predicted), 1)).chunk(2, 1)
        return scales, means

    def put(self, rows: Tensor, columns: Tensor, y_hat: Tensor) -> None:
        """Make the latents at these places known, (1, M, places, 1)."""
        places = rows * self.stride + columns + self.corner
        self.known[:, places] = self.context.prediction.input_integers(y_hat)[0, :, :, 0]


class WavefrontEncoder:
    """Takes the place of CompressAI's ``_compress_ar``."""

    def __init__(self, context: Context):
        self.context = context

    @torch.no_grad()
    def __call__(
        self, y_hat: Tensor, params: Tensor, height: int, width: int, kernel_size: int, padding: int
    ) -> bytes:
        """Return the string of latents ``y_hat``, (1, M, H + 2 * padding, W + 2 * padding) and not rounded."""
        del kernel_size
        prior = self.context.conditional
        symbols: list[int] = []
        indexes: list[int] = []
        scan = self.context.scan(params, height, width)
        for rows, columns in scan:
            scales, means = scan.predict(rows, columns)
            y = y_hat[:, :, rows + padding, columns + padding].unsqueeze(3)
            rounded = prior.quantize(y, "symbols", means)
            scan.put(rows, columns, prior.dequantize(rounded, means))
            symbols += rounded.flatten().tolist()
            indexes += prior.build_indexes(scales).flatten().tolist()
        return encode(symbols, indexes, self.context.tables)


class WavefrontDecoder:
    """Takes the place of CompressAI's ``_decompress_ar``."""

    def __init__(self, context: Context):
        self.context = context

    @torch.no_grad()
    def __call__(
        self,
        y_string: bytes,
        y_hat: Tensor,
        params: Tensor,
        height: int,
        width: int,
        kernel_size: int,
        padding: int,
    ) -> None:
        """Write the latents of ``y_string`` into ``y_hat``, (1, M, H + 2 * padding, W + 2 * padding)."""
        del kernel_size
        prior = self.context.conditional
        tables = self.context.tables
        reader = StringReader(y_string, y_hat.size(1) * height * width)
        scan = self.context.scan(params, height, width)
        for rows, columns in scan:
            scales, means = scan.predict(rows, columns)
            indexes = prior.build_indexes(scales).flatten().tolist()
            symbols = torch.tensor(reader.read(indexes, tables), device=means.device)
            values = prior.dequantize(symbols.view(means.shape), means)
            scan.put(rows, columns, values)
            y_hat[:, :, rows + padding, columns + padding] = values[:, :, :, 0].to(y_hat.dtype)
        reader.end()
