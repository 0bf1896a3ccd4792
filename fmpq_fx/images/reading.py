"""Images as tensors: read and write files of every kind, and check tensors that are given as images."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.files import WRITER, replacing

WRITTEN = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LOSSY = (".jpeg", ".jpg")  # suffixes of formats that cannot keep every pixel
READ = (".avif", ".gif", ".jfif", ".j2k", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".tga")
# Of a folder's images; those that need a plugin of Pillow are errors without it, rather than left out without a word.
SUFFIXES = WRITTEN + READ + (".heic", ".heif", ".jxl")
CHANNELS = range(1, 5)  # numbers of channels that images may have; image files have 3

# Values may lie this far outside [0, 1]: resizing in float arithmetic makes such values.
_ROUNDING = 1e-4


def read(path: str | os.PathLike[str]) -> Tensor:
    """Return the image file ``path`` as an RGB tensor, shape (3, H, W), float32 in [0, 1].

    The EXIF orientation is applied. Gray images become three equal channels. Transparency is composited over
    white, the page that such images are made for. Gray images of 16 bits keep all of them; of 16-bit colour
    Pillow gives the upper 8 bits, so these arrive here. Colour profiles are not applied.

    Raises:
        FmpqError: ``path`` cannot be read as an image, is truncated, has more pixels than Pillow's protection
            against decompression bombs lets through, has no defined white (float, 32-bit), or holds several images.
    """
    path = Path(path)
    with _reading(path), Image.open(path) as image:
        _check_single(image)
        deep = image.mode.startswith("I")
        levels = _levels(image) if deep else None
        upright = ImageOps.exif_transpose(image)
        pixels = _rgb(upright) if levels is None else _deep_gray(upright, *levels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if :func:`write` knows the format that its suffix names.

    Raises:
        ValueError: it does not know it.
    """
    if Path(path).suffix.lower() not in WRITTEN:
        raise ValueError(f"cannot write {path}: expected one of {', '.join(WRITTEN)} at its end")
    return Path(path)


def write(image: Tensor, path: str | os.PathLike[str], stop: Event | None = None) -> None:
    """Write ``image``, (3, H, W) in [0, 1], to ``path`` with 8 bits per value, all of it or nothing.

    Every pixel is kept if the format can do that; a JPEG (:data:`LOSSY`) is written at its best quality.
    ``stop`` is as for :func:`fmpq_fx.storage.files.replacing`.

    Raises:
        ValueError: the suffix names no format of images.
        FileNotFoundError: there is no such folder.
    """
    check_writable(path)
    pixels = (image * 255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    form = Image.registered_extensions()[Path(path).suffix.lower()]
    with replacing(path, stop) as file:
        Image.fromarray(pixels).save(file, form, **_options(form))


def _options(form: str) -> dict[str, Any]:
    """Return Pillow's options to keep every pixel, or as much as it can, and to name the writer of the file."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = WRITER
    text = PngInfo()
    text.add_text("Software", WRITER)
    options: dict[str, dict[str, Any]] = {
        "PNG": {"pnginfo": text},
        "TIFF": {"exif": exif},
        "WEBP": {"exif": exif, "lossless": True},
        "JPEG": {"exif": exif, "quality": 100, "subsampling": 0},
    }
    return options.get(form, {})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn every error of the block into an FmpqError that says why ``path`` cannot be read."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise FmpqError(f"cannot read {path}: not an image, or not in a format that Pillow reads") from error
    # Pillow's readers raise nearly any error for a damaged file: SyntaxError, struct.error, IndexError ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FmpqError(f"cannot read {path}: {reason}") from error


def _check_single(image: Image.Image) -> None:
    """Raise a ValueError if the file has several images, since all but the first would be lost."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG, with previews or a second view of the same
        raise ValueError(f"it holds {frames} images, as an animation or pages; save the wanted one alone")


def _rgb(image: Image.Image) -> NDArray[np.float32]:
    """Return the pixels of ``image``, (H, W, 3), in [0, 1]; ValueError if their range is not known."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits per value")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / np.float32(255)
        alpha = rgba[..., 3:]
        over_white: NDArray[np.float32] = rgba[..., :3] * alpha + (1 - alpha)
        return over_white
    return np.divide(np.asarray(image.convert("RGB")), np.float32(255), dtype=np.float32)


def _levels(image: Image.Image) -> tuple[int, int]:
    """Return the values of black and of white in ``image``, which is gray and has more than 8 bits.

    They follow from the depth that the file states, never from the values of this one image.

    Raises:
        ValueError: the file does not state the value of white.
    """
    if image.format in ("PNG", "PPM", "JPEG2000"):  # Pillow scales values of fewer bits
        return 0, 65535
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        raise ValueError(
            f"{image.format} does not say what value is white; save it with 8 or 16 bits, as PNG"
        )
    bits, unsigned = tags.get(BITSPERSAMPLE, (1,))[0], tags.get(SAMPLEFORMAT, (1,))[0] == 1
    if bits > 16 or not unsigned:
        sign = "" if unsigned else ", with a sign"
        raise ValueError(f"its pixels have {bits} bits{sign}; save it with 8 or 16 bits per value")
    white = 2**bits - 1
    return (white, 0) if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else (0, white)


def _deep_gray(image: Image.Image, black: int, white: int) -> NDArray[np.float32]:
    """Return the pixels of a gray image, (H, W, 3), in [0, 1].

    Pillow's own conversion to RGB clips them at 255.
    """
    gray = np.asarray(image).astype(np.float32)
    gray[gray == image.info.get("transparency", -1)] = white
    return np.repeat((gray[..., None] - black) / np.float32(white - black), 3, axis=2)


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the image files of ``folder``, by their suffix (``SUFFIXES``, in either case), sorted by name.

    Subfolders and hidden files are left out.

    Raises:
        FmpqError: ``folder`` does not exist, is no folder, or has no image file directly in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FmpqError(f"no such image folder: {folder}")
    if not folder.is_dir():
        raise FmpqError(f"{folder} is a file where a folder of images was expected; give its folder")
    # Files whose names start with a dot belong to an editor or an operating system, whatever their suffix.
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()]
    if not found:
        looked_for = ", ".join(SUFFIXES)
        raise FmpqError(f"no images in {folder}: no {looked_for} files there (subfolders are not searched)")
    return sorted(found)


@dataclass(frozen=True)
class Source:
    """An image that may turn out unusable. It is loaded when needed, so that memory holds one image at a time."""

    name: str  # the image's name in messages
    load: Callable[[], Tensor]  # returns (C, H, W); raises FmpqError if the image cannot be read
    size: Callable[[], tuple[int, int]]  # returns height and width, pixels; raises FmpqError as well
    version: str  # changes with the content, as far as can be told without reading a file


def sources(images: str | os.PathLike[str] | Iterable[Tensor | Source]) -> list[Source]:
    """Return the images of a folder, or each of the given tensors (C, H, W) or (B, C, H, W).

    Raises:
        FmpqError: the folder cannot be used (see :func:`find`).
        TypeError, ValueError: there are no tensors, or one is not float (…, C, H, W) in [0, 1], or they have
            different numbers of channels.
    """
    if isinstance(images, str | os.PathLike):
        return [_file(path) for path in find(images)]
    if isinstance(images, Tensor) or not isinstance(images, Iterable):
        raise TypeError(
            f"images are a {type(images).__name__}; expected an image folder, or a list of float tensors"
        )
    found: list[Source] = []
    tensors: list[Tensor] = []
    for given in images:
        if isinstance(given, Source):
            found.append(given)
        else:
            tensors.append(checked(given, f"image {len(found)}"))
            found += [_in_memory(image, f"image {len(found)}") for image in tensors[-1]]
    if not found:
        raise ValueError("no images to cut crops from: the sequence is empty")
    check_channels(tensors)
    return found


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return ``count`` of the numbers below ``total``, evenly spaced between both ends."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def in_short(complaints: Sequence[str]) -> str:
    """Return the first three of ``complaints`` and how many more there are."""
    more = f"; and {len(complaints) - 3} more" if len(complaints) > 3 else ""
    return "; ".join(complaints[:3]) + more


def fingerprint(images: Iterable[Source]) -> str:
    """Return the number of images, and a digest of their versions, as a text."""
    versions = [image.version for image in images]
    digest = hashlib.sha256("\n".join(versions).encode()).hexdigest()
    return f"{len(versions)} images, {digest[:12]}"


def _in_memory(image: Tensor, name: str) -> Source:
    image = image.cpu()  # worker processes and pinned memory need it there
    version = f"{tuple(image.shape)} of sum {image.sum(dtype=torch.float64).item()!r}"
    return Source(name, image.detach, partial(_sides, image), version)


def _sides(image: Tensor) -> tuple[int, int]:
    return image.size(1), image.size(2)


def _file(path: Path) -> Source:
    return Source(
        str(path), partial(read, path), partial(_size, path), f"{path.name}, {path.stat().st_size} bytes"
    )


def _size(path: Path) -> tuple[int, int]:
    """Return height and width from the head of the file, before the EXIF orientation is applied."""
    with _reading(path), Image.open(path) as image:
        _check_single(image)
        return image.height, image.width


def checked(value: object, name: str) -> Tensor:
    """Return ``value`` as (B, C, H, W) float32 if it holds images in [0, 1] of 1 to 4 channels.

    Raises:
        TypeError, ValueError: it holds no such images; the message names ``name``.
    """
    if not isinstance(value, Tensor):
        hint = "; of (images, labels) pairs pass the images" if isinstance(value, list | tuple) else ""
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float tensor (B, C, H, W){hint}")
    if value.ndim not in (3, 4) or value.size(-3) not in CHANNELS:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected (B, C, H, W) or (C, H, W), with C from {CHANNELS[0]} to "
            f"{CHANNELS[-1]} channels: 3 for colour images"
        )
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}, expected floats in [0, 1]; divide 8-bit values by 255")
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, which holds no pixels")
    low, high = (float(extreme) for extreme in value.detach().aminmax())
    if math.isnan(low):  # aminmax passes NaN on
        raise ValueError(f"{name} contains NaN")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        remedy = "divide by 255" if low >= 0 and high > 2 else "undo the normalization, or clamp"
        raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, expected [0, 1]; {remedy}")
    return value.detach().float().reshape(-1, *value.shape[-3:])


def check_channels(images: Iterable[Tensor]) -> None:
    """Check that batches (B, C, H, W) have the same number of channels.

    Raises:
        ValueError: the numbers differ.
    """
    found = sorted({x.size(1) for x in images})
    if len(found) > 1:
        raise ValueError(f"the images have {' and '.join(map(str, found))} channels; a model takes one kind")
