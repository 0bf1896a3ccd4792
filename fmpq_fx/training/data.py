"""Images for training: random crops, read ahead in worker processes, and photographs held out for validation."""

import os
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fmpq_fx.errors import FmpqError
from fmpq_fx.images.reading import Source, evenly_spaced, in_short
from fmpq_fx.ranks import ALONE, Ranks

HELD_OUT = 8
"""The most images that are held out without validation images; of fewer than 80 images, a tenth is."""


def large_enough(images: Sequence[Source], size: int) -> list[Source]:
    """Return the images that a crop of ``size`` x ``size`` fits into; the others are skipped with a warning.

    Raises:
        FmpqError: no image is large enough.
    """
    usable: list[Source] = []
    complaints: list[str] = []
    for image in images:
        try:
            height, width = image.size()
        except FmpqError as error:
            complaints.append(str(error))
            continue
        if min(height, width) >= size:
            usable.append(image)
        else:
            complaints.append(f"{image.name} is {width} x {height}, smaller than the crop")
    listed = in_short(complaints)
    if not usable:
        raise FmpqError(
            f"none of the {len(images)} images can be used for crops of {size} x {size}: {listed}; pass larger images "
            "or a smaller crop"
        )
    if complaints:
        warnings.warn(f"{len(complaints)} of {len(images)} images skipped: {listed}", stacklevel=2)
    return usable


def hold_out(images: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """Return (images to train on, images to validate on): evenly spaced images are held out.

    Raises:
        FmpqError: there is only one image.
    """
    if len(images) < 2:
        raise FmpqError(
            f"there is only {len(images)} usable image, too few to train on and to validate on another; pass at least "
            "two, or images to validate on (validation=...)"
        )
    count = max(1, min(HELD_OUT, len(images) // 10))
    chosen = evenly_spaced(len(images), count)
    return (
        [image for i, image in enumerate(images) if i not in chosen],
        [image for i, image in enumerate(images) if i in chosen],
    )


class RandomCrops(Dataset[Tensor]):
    """Endless random crops of photographs, half of them mirrored.

    Crop number ``i`` is a function of the seed and ``i`` alone, so that training can go on anywhere. Every image
    is used once before any is used again. An image that cannot be read is replaced by the next, with a warning.

    Args:
        images: images of at least ``size`` x ``size`` pixels each.
        size: side of a crop in pixels.
        seed: seed of the choice.
    """

    def __init__(self, images: Sequence[Source], size: int, seed: int):
        self.images, self.size, self.seed = images, size, seed

    def __getitem__(self, index: int) -> Tensor:
        """Return crop number ``index``, (3, size, size), float32 in [0, 1]."""
        epoch, place = divmod(index, len(self.images))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        rng = np.random.default_rng([self.seed, epoch, place])
        image = self._load(np.roll(order, -place).tolist())
        top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[1:])
        crop = image[:, top : top + self.size, left : left + self.size]
        return (crop.flip(2) if rng.random() < 0.5 else crop).contiguous()

    def _load(self, order: Sequence[int]) -> Tensor:
        for number in order:
            try:
                return self.images[number].load()
            except FmpqError as error:
                warnings.warn(f"image skipped: {error}", stacklevel=2)
        raise FmpqError(f"none of the {len(self.images)} images can be read any more; see the warnings")


def batches(
    crops: RandomCrops,
    batch_size: int,
    steps: range,
    ranks: Ranks = ALONE,
    *,
    workers: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[Tensor]:
    """Return the batches of ``steps``, (batch_size / ranks, 3, size, size) each, read ahead by ``workers`` processes.

    Args:
        crops: the crops; batch ``i`` has crops ``i * batch_size`` and on, or this rank's share of them.
        batch_size: crops in a batch of all ranks together.
        steps: numbers of the batches.
        ranks: the processes that share the crops of a batch.
        workers: processes that read for this rank; 0 reads in this process, None chooses.
        pin_memory: whether to pin memory, for faster copies to a GPU.
    """
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) // (2 * ranks.count)))
    numbers = [list(ranks.share(range(step * batch_size, (step + 1) * batch_size))) for step in steps]
    # Without a generator, the workers' seed, which nothing here uses, would be drawn from the caller's random numbers.
    generator = torch.Generator().manual_seed(crops.seed)
    return DataLoader(
        crops, batch_sampler=numbers, num_workers=workers, pin_memory=pin_memory, generator=generator
    )
