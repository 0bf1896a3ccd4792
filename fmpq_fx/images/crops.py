"""Calibration images: cut crops out of photographs, and check tensors that are given as calibration."""

import os
import warnings
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fmpq_fx import samples
from fmpq_fx.errors import FmpqError
from fmpq_fx.images.reading import Source, check_channels, checked, evenly_spaced, in_short, sources

# The argument `calibration` of `prepare` and `analyze`; see `batches`.
Calibration: TypeAlias = str | os.PathLike[str] | Tensor | Iterable[Tensor] | None

MORE = 56
"""Crops of a folder that activations are observed on, besides the crops that losses are measured on."""


def cut(
    source: str | os.PathLike[str] | Iterable[Tensor | Source],
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
        source: a folder (see `reading.find`), or images: tensors (C, H, W) or (B, C, H, W), float in
            [0, 1], or `reading.sources`.
        size: side of a crop in pixels, a multiple of ``multiple``.
        count: number of crops wanted, at least 1.
        seed: seed of the random choice; None for the fixed one.
        multiple: sides of crops are multiples of this, as the model needs; 64 serves all of CompressAI's models.

    Returns:
        Batches (B, C, h, w), float32 in [0, 1], one for each size of crop: normally one batch of ``count``.

    Raises:
        FmpqError: the folder cannot be used (see `reading.find`), or none of the images can.
        TypeError, ValueError: an argument is out of its range, or an image is not as described.
    """
    if count < 1 or multiple < 1:
        raise ValueError(f"count and multiple must be at least 1, got {count} and {multiple}")
    if size < multiple or size % multiple:
        raise ValueError(f"size must be a positive multiple of {multiple}, got {size}")
    images = sources(source)
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        images = [images[i] for i in torch.randperm(len(images), generator=generator, device="cpu").tolist()]
    usable, complaints = _survey(images, count, size, multiple)
    if not usable:
        raise FmpqError(f"none of the {len(images)} images can be used: {in_short(complaints)}")
    for complaint in complaints:
        warnings.warn(f"image skipped: {complaint}", stacklevel=2)
    shares = _shares([image.capacity(seed is not None) for image in usable], count)
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for image, share in zip(usable, shares, strict=True):
        by_size.setdefault(image.box, []).extend(image.cut(share, generator))
    return [torch.stack(cuts) for cuts in by_size.values()]


@dataclass(frozen=True)
class _Usable:
    """An image that crops can be cut from. It is loaded again to cut, so that memory holds one image at a time."""

    load: Callable[[], Tensor]
    box: tuple[int, int]  # height and width of its crops, pixels
    room: tuple[int, int]  # how far a crop can move down and to the right, pixels

    def capacity(self, random: bool) -> int:
        """Return the number of different crops: all if ``random``, else those on the line that `cut` uses."""
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
            places[int(torch.randint(self.capacity(random=True), (), generator=generator, device="cpu"))] = (
                None
            )
        return [divmod(place, columns) for place in places]


def _survey(images: list[Source], count: int, size: int, multiple: int) -> tuple[list[_Usable], list[str]]:
    """Return up to ``count`` usable ``images``, evenly spaced, and why others that were tried are not usable."""
    total, wanted = len(images), min(count, len(images))
    chosen = evenly_spaced(total, wanted)
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
                if spares:  # the next spare after the place, or the first one
                    candidates = [spares.pop(bisect(spares, place) % len(spares))]
    return usable, complaints


def _fit(image: Source, size: int, multiple: int) -> _Usable:
    """Return the crops that fit into ``image``; FmpqError if none does, or the image cannot be read."""
    height, width = image.load().shape[1:]
    if min(height, width) < multiple:
        raise FmpqError(f"{image.name} is {width} x {height}, needed is at least {multiple} x {multiple}")
    box_height, box_width = (size if side >= size else side - side % multiple for side in (height, width))
    return _Usable(image.load, (box_height, box_width), (height - box_height, width - box_width))


def _shares(capacities: Sequence[int], count: int) -> list[int]:
    """Deal ``count`` crops to images in turn, to none more than its capacity; return the number of each."""
    shares = [0] * len(capacities)
    left = min(count, sum(capacities))
    while left:
        for i, capacity in enumerate(capacities):
            if left and shares[i] < capacity:
                shares[i] += 1
                left -= 1
    return shares


def batches(calibration: Calibration) -> list[Tensor]:
    """Return any form of calibration as a checked list of batches, (B, C, H, W) float32 in [0, 1].

    Image files and photographs have 3 channels; for a model that takes 1 or 4, pass tensors.

    Args:
        calibration: an image folder, from which crops are cut; a tensor (B, C, H, W) or (C, H, W), float in
            [0, 1]; an iterable of such tensors, read to its end; or None for the crops of `samples.photos`.

    Raises:
        FmpqError: the folder has no usable image.
        TypeError: ``calibration`` is none of these, or not float.
        ValueError: a wrong shape, values outside [0, 1], NaN, no tensors at all, or different numbers of channels.
    """
    if (photographs := _photographs(calibration)) is not None:
        return cut(photographs)
    if isinstance(calibration, Tensor):
        return [checked(calibration, "calibration")]
    if not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise TypeError(f"calibration is a {kind}; expected an image folder, tensors (B, C, H, W), or None")
    given = [checked(batch, f"calibration batch {i}") for i, batch in enumerate(calibration)]
    if not given:
        raise ValueError("calibration is empty: no tensor came out of it (a generator gives them only once)")
    check_channels(given)
    return given


def more(calibration: Calibration, count: int = MORE) -> list[Tensor]:
    """Return ``count`` further crops if ``calibration`` is a folder or None, else nothing: all images were given.

    Warnings about images are not repeated; :func:`batches` has given them.
    """
    photographs = _photographs(calibration)
    if photographs is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cut(photographs, count=count)


def _photographs(calibration: Calibration) -> str | os.PathLike[str] | Iterable[Tensor] | None:
    """Return the photographs to cut crops out of; None if ``calibration`` is the images themselves."""
    if calibration is None:
        return samples.photos().values()
    return calibration if isinstance(calibration, str | os.PathLike) else None


def describe(batches: Iterable[Tensor]) -> str:
    """Return the number of images in ``batches`` by width x height: "8 crops of 256 x 256, 1 of 192 x 128"."""
    counts: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        counts[batch.size(-1), batch.size(-2)] += len(batch)
    text = ", ".join(f"{count} of {width} x {height}" for (width, height), count in counts.items())
    return text.replace(" of", " crop of" if text.startswith("1 ") else " crops of", 1) or "no crops"
