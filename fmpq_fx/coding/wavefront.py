"""Coding loops of autoregressive models, in exact arithmetic, along wavefronts instead of place by place.

A masked convolution of k x k sees the rows above, and the places to the left in its own row. So places with the same
w + (k // 2 + 1) * h do not depend on each other, and are computed together: 141 steps for 32 x 48 latents and k = 5
instead of 1536. The symbols are coded in this order, since a decoder needs all places of a step before the next step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmpq_fx.coding import string_coder
from fmpq_fx.errors import FmpqError
from fmpq_fx.exact.layers import ExactLayer
from fmpq_fx.exact.products import ConvProduct, product_of
from fmpq_fx.passes.lower.extents import float_layer


def check(model: Any) -> None:
    """Check that these loops compute what the layers of ``model``, which are quantized, compute.

    Raises:
        FmpqError: its context prediction or its entropy parameters do something that the coding loop cannot.
    """
    prediction = product_of(float_layer(model.context_prediction))
    if not isinstance(prediction, ConvProduct) or {
        prediction.groups,
        *prediction.stride,
        *prediction.dilation,
    } != {1}:
        raise FmpqError("the context prediction has groups, strides or dilation, which no coding loop has")
    products = (product_of(float_layer(module)) for module in model.entropy_parameters.modules())
    if not all(product is None or product.pointwise for product in products):
        raise FmpqError("the entropy parameters depend on other places, which the coding loop does not have")
    weight = model.context_prediction.weight * model.context_prediction.mask
    _, later = _divided(prediction.kernel)
    if any(weight[:, :, row, column].any() for row, column in later):
        raise FmpqError("the context prediction sees what is not decoded yet")


def _divided(kernel: tuple[int, ...]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the places of a kernel that come before its middle in reading order, and the other places."""
    places = [(row, column) for row in range(kernel[0]) for column in range(kernel[1])]
    middle = (kernel[0] // 2, kernel[1] // 2)
    return [place for place in places if place < middle], [place for place in places if place >= middle]


class Context:
    """The parts of a checked autoregressive model (:func:`check`) that predict the parameters of a latent.

    Args:
        conditional: the entropy model of the latents.
        prediction: the masked convolution.
        parameters: maps the parameters of the hyperprior and the prediction, concatenated, to scales and means, at each
            place separately.
    """

    def __init__(self, conditional: Any, prediction: Any, parameters: nn.Module):
        assert isinstance(prediction, ExactLayer)
        assert isinstance(prediction.product, ConvProduct)
        self.conditional, self.prediction, self.parameters = conditional, prediction, parameters
        self.kernel = prediction.product.kernel
        matrix = prediction.matrix.view(prediction.matrix.size(1), -1, *self.kernel)
        self.taps, _ = _divided(self.kernel)
        self.matrix = torch.cat([matrix[:, :, row, column] for row, column in self.taps], 1)

    @property
    def tables(self) -> string_coder.Tables:
        """The tables of the entropy model, trimmed, since the coder reads them again in every step."""
        prior = self.conditional
        return string_coder.trimmed_tables(prior.quantized_cdf, prior.cdf_length, prior.offset)


class Scan:
    """The latents of one image while they are coded step by step.

    Args:
        context: the parts of the model that predict.
        params: the parameters from the hyperprior, (1, C, height, width).
        height: height of the latents.
        width: width of the latents.
    """

    def __init__(self, context: Context, params: Tensor, height: int, width: int):
        self.context, self.params, self.height, self.width = context, params[0], height, width
        rows, columns = context.kernel
        self.stride = width + columns - 1
        prediction = context.prediction
        self.matrix = context.matrix
        self.taps = torch.tensor(
            [row * self.stride + column for row, column in context.taps], device=params.device
        )
        channels = self.matrix.size(1) // len(context.taps)
        # The integers that the convolution multiplies, 0 where not known yet; padded, so that every tap is inside.
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
        """Store the latents at these places, (1, M, places, 1), for later predictions."""
        places = rows * self.stride + columns + self.corner
        self.known[:, places] = self.context.prediction.input_integers(y_hat)[0, :, :, 0]


@torch.no_grad()
def encode(context: Context, y_hat: Tensor, params: Tensor, size: tuple[int, int], padding: int) -> bytes:
    """Return the string of the latents of one image, as CompressAI's ``_compress_ar`` does.

    Args:
        context: the parts of the model that predict.
        y_hat: the latents, not rounded, (1, M, H + 2 * padding, W + 2 * padding).
        params: the parameters from the hyperprior, (1, C, H, W).
        size: H and W.
        padding: the padding on each side of ``y_hat``.

    Raises:
        FmpqError: a latent is too far from its mean.
    """
    prior = context.conditional
    symbols: list[int] = []
    indexes: list[int] = []
    scan = Scan(context, params, *size)
    for rows, columns in scan:
        scales, means = scan.predict(rows, columns)
        y = y_hat[:, :, rows + padding, columns + padding].unsqueeze(3)
        rounded = prior.quantize(y, "symbols", means)
        scan.put(rows, columns, prior.dequantize(rounded, means))
        symbols += rounded.flatten().tolist()
        indexes += prior.build_indexes(scales).flatten().tolist()
    return string_coder.encode(symbols, indexes, context.tables)


@torch.no_grad()
def decode(
    context: Context, y_string: bytes, y_hat: Tensor, params: Tensor, size: tuple[int, int], padding: int
) -> None:
    """Write the latents of ``y_string`` into ``y_hat``, as CompressAI's ``_decompress_ar`` does; see :func:`encode`."""
    prior, tables = context.conditional, context.tables
    reader = string_coder.StringReader(y_string, y_hat.size(1) * size[0] * size[1])
    scan = Scan(context, params, *size)
    for rows, columns in scan:
        scales, means = scan.predict(rows, columns)
        indexes = prior.build_indexes(scales).flatten().tolist()
        symbols = torch.tensor(reader.read(indexes, tables), device=means.device)
        values = prior.dequantize(symbols.view(means.shape), means)
        scan.put(rows, columns, values)
        y_hat[:, :, rows + padding, columns + padding] = values[:, :, :, 0].to(y_hat.dtype)
    reader.end()
