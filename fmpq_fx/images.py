"""Images as tensors: reading files, cutting calibration crops, checking what is given as calibration."""

import math
import os
import warnings
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fmpq_fx import samples
from fmpq_fx.errors import FmpqError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

# What `prepare` and `analyze` take as calibration; see `batches`.
Calibration: TypeAlias = str | os.PathLike[str] | Tensor | Iterable[Tensor] | None

# Resizing in float arithmetic ends this far outside [0, 1] without anything being wrong.
_ROUNDING = 1e-4


def read(path: str | os.PathLike[str]) -> Tensor:
    """Return the image file ``path`` as an RGB tensor, shape (3, H, W), float32 in [0, 1].

    The EXIF orientation is applied. Gray images become three equal channels. Transparency is composited over
    white, the page that such images are made for. Gray images of 16 bits keep all of them; of 16-bit colour
    Pillow gives the upper 8 bits, so these arrive here. Of an animation the first frame is taken. Colour
    profiles are not applied.

    Raises:
        FmpqError: ``path`` cannot be read as an image, is truncated, has more pixels than Pillow's protection
            against decompression bombs lets through, or has pixels without a defined white (float, 32-bit).
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            pixels = _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise FmpqError(f"cannot read {path}: not an image, or not in a format that Pillow reads") from error
    # Pillow's readers let nearly anything out of a damaged file: SyntaxError, struct.error, IndexError ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FmpqError(f"cannot read {path}: {reason}") from error
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _rgb(image: Image.Image) -> NDArray[np.float32]:
    """Return the pixels of ``image``, (H, W, 3), in [0, 1]; ValueError where their range is not known."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits per value")
    if image.mode.startswith("I"):
        # Not Pillow's own conversion to RGB, which clips 16-bit values at 255.
        gray = np.asarray(image).astype(np.float32)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("its pixels have 32 bits; save it with 8 or 16 bits per value")
        gray[gray == image.info.get("transparency", -1)] = 65535
        return np.repeat(gray[..., None] / np.float32(65535), 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / np.float32(255)
        alpha = rgba[..., 3:]
        over_white: NDArray[np.float32] = rgba[..., :3] * alpha + (1 - alpha)
        return over_white
    return np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)


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
    # A name that starts with a dot is an editor's or an operating system's, whatever its suffix says.
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()]
    if not found:
        looked_for = ", ".join(SUFFIXES)
        raise FmpqError(f"no images in {folder}: no {looked_for} files there (subfolders are not searched)")
    return sorted(found)


def crops(
    source: str | os.PathLike[str] | Iterable[Tensor],
    *,
    size: int = 256,
    count: int = 8,
    seed: int | None = None,
    multiple: int = 64,
) -> list[Tensor]:
    """Cut calibration crops of ``size`` x ``size`` pixels out of photographs.

    Without a seed the choice is fixed: of more than ``count`` images, evenly spaced ones give their centre;
    of fewer, each gives several crops, spread evenly along the side that has more room (as a rule the longer
    one). With a seed, images and positions are random, and the same for the same seed. No crop comes twice,
    so small images can yield fewer than ``count``.

    An image that is shorter than ``size`` in a direction is cropped to the largest multiple of ``multiple``
    that fits there. One that is shorter than ``multiple``, or an unreadable file, is skipped with a warning
    and the next usable image not yet chosen takes its place.

    Args:
        source: a folder (see `find`), or images: tensors (3, H, W) or (B, 3, H, W), float in [0, 1].
        size: side of a crop in pixels, a multiple of ``multiple``.
        count: number of crops wanted, at least 1.
        seed: of the random choice; None for the fixed one.
        multiple: what the model needs image sides to be a multiple of; 64 serves all of CompressAI's.

    Returns:
        Batches (B, 3, h, w), float32 in [0, 1], one for each size of crop: normally one batch of ``count``.

    Raises:
        FmpqError: the folder cannot be used (see `find`), or none of the images can.
        TypeError, ValueError: an argument is out of its range, or an image is not as described.
    """
    if count < 1 or multiple < 1:
        raise ValueError(f"count and multiple must be at least 1, got {count} and {multiple}")
    if size < multiple or size % multiple:
        raise ValueError(f"size must be a positive multiple of {multiple}, got {size}")
    images = _sources(source)
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        images = [images[i] for i in torch.randperm(len(images), generator=generator).tolist()]
    usable, complaints = _survey(images, count, size, multiple)
    if not usable:
        more = f"; and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise FmpqError(f"none of the {len(images)} images can be used: {'; '.join(complaints[:3])}{more}")
    for complaint in complaints:
        warnings.warn(f"image skipped: {complaint}", stacklevel=2)
    shares = _shares([image.capacity(seed is not None) for image in usable], count)
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for image, share in zip(usable, shares, strict=True):
        by_size.setdefault(image.box, []).extend(image.cut(share, generator))
    return [torch.stack(cuts) for cuts in by_size.values()]


@dataclass(frozen=True)
class _Source:
    """An image that may turn out unusable."""

    name: str  # for messages
    load: Callable[[], Tensor]  # returns (3, H, W); raises FmpqError where it cannot


@dataclass(frozen=True)
class _Usable:
    """An image that crops can be cut from. It is loaded anew to cut, so that memory holds one at a time."""

    load: Callable[[], Tensor]
    box: tuple[int, int]  # height and width of its crops, pixels
    room: tuple[int, int]  # how far a crop can move down and to the right, pixels

    def capacity(self, random: bool) -> int:
        """Return how many different crops there are, at all or on the line that `cut` spreads them along."""
        down, right = self.room
        return (down + 1) * (right + 1) if random else max(self.room) + 1

    def cut(self, count: int, generator: torch.Generator | None) -> list[Tensor]:
        """Return ``count`` different crops, at most `capacity`."""
        image = self.load()
        height, width = self.box
        corners = self._spread(count) if generator is None else self._random(count, generator)
        # Clones, because a view would keep all of the image in memory.
        return [image[:, top : top + height, left : left + width].clone() for top, left in corners]

    def _spread(self, count: int) -> list[tuple[int, int]]:
        down, right = self.room
        if count == 1:
            return [(down // 2, right // 2)]
        steps = [i * max(self.room) // (count - 1) for i in range(count)]
        return [(down // 2, step) if right >= down else (step, right // 2) for step in steps]

    def _random(self, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
        columns = self.room[1] + 1
        places: dict[int, None] = {}  # a set that keeps its order
        while len(places) < count:
            places[int(torch.randint(self.capacity(random=True), (), generator=generator))] = None
        return [divmod(place, columns) for place in places]


def _sources(source: str | os.PathLike[str] | Iterable[Tensor]) -> list[_Source]:
    if isinstance(source, str | os.PathLike):
        return [_Source(str(path), partial(read, path)) for path in find(source)]
    given = [image for i, batch in enumerate(source) for image in _checked(batch, f"image {i}")]
    if not given:
        raise ValueError("no images to cut crops from: the sequence is empty")
    return [_Source(f"image {i}", image.detach) for i, image in enumerate(given)]


def _survey(images: list[_Source], count: int, size: int, multiple: int) -> tuple[list[_Usable], list[str]]:
    """Return up to ``count`` usable ones of ``images``, evenly spaced, and why others it tried are not."""
    total, wanted = len(images), min(count, len(images))
    chosen = [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]
    spares = sorted(set(range(total)).difference(chosen))
    usable: list[_Usable] = []
    complaints: list[str] = []
    for place in chosen:
        candidates = [place]
        while candidates:
            image = images[candidates.pop()]
            try:
                usable.append(_fit(image, size, multiple))
            except FmpqError as error:
                complaints.append(str(error))
                if spares:  # the next one after the place, around the end if need be
                    candidates = [spares.pop(bisect(spares, place) % len(spares))]
    return usable, complaints


def _fit(image: _Source, size: int, multiple: int) -> _Usable:
    """Return how crops fit into ``image``; FmpqError where they do not, or where it cannot be read."""
    height, width = image.load().shape[1:]
    if min(height, width) < multiple:
        raise FmpqError(f"{image.name} is {width} x {height}, needed is at least {multiple} x {multiple}")
    box_height, box_width = (size if side >= size else side - side % multiple for side in (height, width))
    return _Usable(image.load, (box_height, box_width), (height - box_height, width - box_width))


def _shares(capacities: Sequence[int], count: int) -> list[int]:
    """Deal ``count`` crops to images in turn, to none more than its capacity."""
    shares = [0] * len(capacities)
    left = min(count, sum(capacities))
    while left:
        for i, capacity in enumerate(capacities):
            if left and shares[i] < capacity:
                shares[i] += 1
                left -= 1
    return shares


def batches(calibration: Calibration) -> list[Tensor]:
    """Return any form of calibration as a checked list of batches, (B, 3, H, W) float32 in [0, 1].

    Args:
        calibration: an image folder, of which `crops` are taken; a tensor (B, 3, H, W) or (3, H, W), float in
            [0, 1]; an iterable of such tensors, read to its end; or None for the crops of `samples.photos`.

    Raises:
        FmpqError: the folder has no usable image.
        TypeError: not one of these, or not floats.
        ValueError: wrong shape, values outside [0, 1], NaN, or no tensors at all.
    """
    if calibration is None:
        return crops(samples.photos().values())
    if isinstance(calibration, str | os.PathLike):
        return crops(calibration)
    if isinstance(calibration, Tensor):
        return [_checked(calibration, "calibration")]
    if not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise TypeError(f"calibration is a {kind}; expected an image folder, tensors (B, 3, H, W), or None")
    checked = [_checked(batch, f"calibration batch {i}") for i, batch in enumerate(calibration)]
    if not checked:
        raise ValueError("calibration is empty: no tensor came out of it (a generator gives them only once)")
    return checked


def describe(batches: Iterable[Tensor]) -> str:
    """Return how many images ``batches`` hold, by width x height: "8 crops of 256 x 256, 1 of 192 x 128"."""
    counts: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        counts[batch.size(-1), batch.size(-2)] += len(batch)
    text = ", ".join(f"{count} of {width} x {height}" for (width, height), count in counts.items())
    return text.replace(" of", " crop of" if text.startswith("1 ") else " crops of", 1) or "no crops"


def _checked(value: object, name: str) -> Tensor:
    """Return ``value`` as (B, 3, H, W) float32 if it holds images in [0, 1]; `batches` lists the errors."""
    if not isinstance(value, Tensor):
        hint = "; of (images, labels) pairs pass the images" if isinstance(value, list | tuple) else ""
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float tensor (B, 3, H, W){hint}")
    if value.ndim not in (3, 4) or value.size(-3) != 3:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (B, 3, H, W) or (3, H, W)")
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}, expected floats in [0, 1]; divide 8-bit values by 255")
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, which holds no pixels")
    low, high = (float(extreme) for extreme in value.detach().aminmax())
    if math.isnan(low):  # aminmax hands it on
        raise ValueError(f"{name} contains NaN")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        remedy = "divide by 255" if low >= 0 and high > 2 else "undo the normalization, or clamp"
        raise ValueError(f"{name} has values from {low:.4g} to {high:.4g}, expected [0, 1]; {remedy}")
    return value.detach().float().reshape(-1, *value.shape[-3:])
