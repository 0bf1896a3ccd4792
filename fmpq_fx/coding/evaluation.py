"""Evaluate a codec on real bitstreams: their bytes, and the images that are decoded from them."""

import copy
import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fmpq_fx.coding import guarded
from fmpq_fx.coding.cdf_tables import update_tables
from fmpq_fx.coding.codec import Codec, codec_of, with_settings
from fmpq_fx.coding.conversion import convert
from fmpq_fx.coding.frame import Frame, stride_of
from fmpq_fx.coding.guarded import Robust
from fmpq_fx.coding.strings import flat
from fmpq_fx.coding.tiling import within
from fmpq_fx.errors import FmpqError
from fmpq_fx.images import reading
from fmpq_fx.images.ms_ssim import LEAST_SIDE, ms_ssim
from fmpq_fx.progress import reported
from fmpq_fx.rd import PEAK, psnr, total_bits

_IMAGES = 5  # images in memory at once while coding and comparing, besides the memory of the transforms


@dataclass(frozen=True)
class ImageResult:
    """The result of coding one image; PSNR and MS-SSIM are of 8-bit images."""

    name: str  # file name, or the image's key in the mapping
    width: int  # pixels
    height: int  # pixels
    bpp: float  # bits of the strings and the guard per pixel of the image
    estimated_bpp: float  # bits per pixel from the likelihoods of the forward pass
    psnr: float  # dB
    ms_ssim: float | None  # None if the image is too small for it
    encode_seconds: float
    decode_seconds: float
    deviation: (
        int  # largest difference between the decoded image and that of the forward pass, in 8-bit levels
    )
    guard_bytes: int = 0  # bytes of the guard, with which other machines decode the same


@dataclass(frozen=True)
class Evaluation:
    """Results per image, and their means."""

    images: tuple[ImageResult, ...]
    skipped: tuple[str, ...] = ()  # the reason for each image that was skipped

    def _mean(self, field: str) -> float:
        values = [getattr(image, field) for image in self.images]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.nan

    @property
    def bpp(self) -> float:
        """Mean over the images of :attr:`ImageResult.bpp`."""
        return self._mean("bpp")

    @property
    def estimated_bpp(self) -> float:
        """Mean over the images of :attr:`ImageResult.estimated_bpp`."""
        return self._mean("estimated_bpp")

    @property
    def psnr(self) -> float:
        """Mean PSNR over the images, dB."""
        return self._mean("psnr")

    @property
    def ms_ssim(self) -> float:
        """Mean MS-SSIM over the images that are large enough for it; NaN if none is."""
        return self._mean("ms_ssim")

    @property
    def deviation(self) -> int:
        """The largest :attr:`ImageResult.deviation`."""
        return max(image.deviation for image in self.images)

    @property
    def guard_bytes(self) -> float:
        """Mean over the images of :attr:`ImageResult.guard_bytes`."""
        return self._mean("guard_bytes")

    def to_json(self) -> str:
        """Return the means and the results per image as a JSON text."""
        means = {name: getattr(self, name) for name in ("bpp", "estimated_bpp", "psnr")}
        means["ms_ssim"] = None if math.isnan(self.ms_ssim) else self.ms_ssim
        content = {"mean": means, "images": list(map(dataclasses.asdict, self.images))}
        return json.dumps(content | ({"skipped": self.skipped} if self.skipped else {}), indent=1)

    def __str__(self) -> str:
        headers = [
            "image",
            "size",
            "bpp",
            "estimate",
            "PSNR (dB)",
            "MS-SSIM",
            "encode (s)",
            "decode (s)",
            "deviation",
        ]
        guarded = self.guard_bytes > 0
        rows = [
            _row(i.name, f"{i.width} x {i.height}", i, i.deviation) + [str(i.guard_bytes)] * guarded
            for i in self.images
        ]
        rows.append(_row("mean", "", self, self.deviation) + [f"{self.guard_bytes:.0f}"] * guarded)
        headers += ["guard (bytes)"] * guarded
        right = ["right"] * (len(headers) - 1)
        return tabulate(rows, headers, disable_numparse=True, colalign=("left", *right))

    @property
    def encode_seconds(self) -> float:
        """Mean time to encode an image, in seconds."""
        return self._mean("encode_seconds")

    @property
    def decode_seconds(self) -> float:
        """Mean time to decode an image, in seconds."""
        return self._mean("decode_seconds")


def _row(name: str, size: str, of: ImageResult | Evaluation, deviation: int) -> list[str]:
    similarity = "-" if of.ms_ssim is None or math.isnan(of.ms_ssim) else f"{of.ms_ssim:.4f}"
    times = (f"{of.encode_seconds:.2f}", f"{of.decode_seconds:.2f}")
    return [
        name,
        size,
        f"{of.bpp:.4f}",
        f"{of.estimated_bpp:.4f}",
        f"{of.psnr:.3f}",
        similarity,
        *times,
        str(deviation),
    ]


def evaluate(
    model: nn.Module,
    images: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    robust: Robust = "auto",
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Encode and decode every image as real bitstreams, and measure bits and quality.

    Args:
        model: a rewritten graph, which is converted first, or any model with CompressAI's ``compress`` and
            ``decompress``. It is not modified.
        images: an image folder, or (C, H, W) tensors in [0, 1] by name, of as many channels as the model takes; of any
            size.
        robust: how images survive another machine; see :func:`fmpq_fx.encode`. None measures the bitstreams of the
            codec's own class, as published figures do.
        memory: the most memory to use besides the codec, in bytes or as "2GB"; None is a quarter of the machine's. An
            image that needs more is transformed in tiles (:func:`fmpq_fx.coding.tiling.within`).
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Returns:
        bits per pixel of the image without its padding, guard included; PSNR and MS-SSIM of images rounded to 8 bits,
        as CompressAI computes them. ``deviation`` is 0 if the decoded image is that of the forward pass. In models
        that predict means (all but the factorized and the scale hyperprior) the forward pass rounds latents in
        another way than coding does, and on a GPU sums differ from run to run: there, a deviation is no fault.

    Raises:
        FmpqError: the model cannot code, or no image can be read and coded within the ``memory`` given. If some can,
            the others are in :attr:`Evaluation.skipped`, and a warning names each.
    """
    codec = _codec(model)
    parameter = next(codec.parameters())
    named = list(_named(images))
    results: list[ImageResult] = []
    skipped: list[str] = []
    with torch.no_grad():
        for name, load in reported(named, "evaluate", "image", show=progress):
            whose = ""  # errors of reading have the file's name in them
            try:
                x = load().to(parameter.device, parameter.dtype)
                whose = f"{name}: "
                frame = Frame(x.size(1), x.size(2), stride_of(codec, x.size(0)))
                tiled = within(codec, frame.size, memory, images=_IMAGES)
                results.append(_code(tiled, name, x, frame, robust))
            except FmpqError as error:
                skipped.append(f"{whose}{error}")
                warnings.warn(f"image skipped: {skipped[-1]}", stacklevel=2)
    if not results:
        raise FmpqError(f"none of the images can be evaluated: {reading.in_short(skipped)}")
    return Evaluation(tuple(results), tuple(skipped))


def _codec(model: nn.Module) -> Codec:
    if isinstance(model, fx.GraphModule):
        return codec_of(convert(model))
    codec = codec_of(copy.deepcopy(model)).eval()
    update_tables(codec, missing=True)
    return codec


def _named(images: str | os.PathLike[str] | Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Yield the name of each image and a function that loads it."""
    if isinstance(images, Mapping):
        for name, x in images.items():
            if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
                what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"image {name!r} is {what}; pass float tensors (C, H, W) in [0, 1]")
            (image,) = reading.checked(x, f"image {name!r}")
            yield name, lambda image=image: image
    else:
        if not isinstance(images, str | os.PathLike):
            raise TypeError(
                f"images are a {type(images).__name__}; pass a folder, or a dict of names and float tensors (C, H, W)"
            )
        for path in reading.find(images):
            yield path.name, lambda path=path: reading.read(path)


def _code(codec: Codec, name: str, x: Tensor, frame: Frame, robust: Robust) -> ImageResult:
    """Code the image ``x`` (C, H, W) in its ``frame``, and measure."""
    height, width = x.shape[-2:]
    # Strings as in files, or those of the codec's own class.
    coder = with_settings(codec, arrays=robust is not None)
    padded = frame.around(x.unsqueeze(0))
    start = time.perf_counter()
    coded = guarded.compress(coder, padded, robust)
    middle = time.perf_counter()
    decoded = guarded.decompress(coder, coded, most=padded.numel())
    if decoded.is_cuda:  # what was started there last is still running
        torch.cuda.synchronize(decoded.device)
    end = time.perf_counter()
    guard_bytes = len(coded.guard)
    bits = 8 * (guard_bytes + sum(map(len, flat(coded.strings))))
    x_hat = _to_8_bits(frame.inside(decoded))
    del coded, decoded
    forward = codec(padded)
    estimated_bits = sum(total_bits(p).item() for p in forward["likelihoods"].values())
    deviation = int((_to_8_bits(frame.inside(forward["x_hat"])) - x_hat).abs_().max())
    del forward, padded
    original = _to_8_bits(x.unsqueeze(0))
    mse = (x_hat - original).square_().mean().item()
    large = min(height, width) >= LEAST_SIDE
    return ImageResult(
        name=name,
        width=width,
        height=height,
        bpp=bits / (height * width),
        estimated_bpp=estimated_bits / (height * width),
        psnr=psnr(mse, PEAK),
        ms_ssim=ms_ssim(original, x_hat, PEAK).item() if large else None,
        encode_seconds=middle - start,
        decode_seconds=end - middle,
        deviation=deviation,
        guard_bytes=guard_bytes,
    )


def _to_8_bits(x: Tensor) -> Tensor:
    return (x * 255).clamp_(0, 255).round_()
