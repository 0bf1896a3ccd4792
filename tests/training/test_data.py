"""Random crops for training: a function of the seed and their number, in whatever process they are cut."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.images.reading import Source, sources
from fmpq_fx.training.data import RandomCrops, batches, hold_out, large_enough


def numbered(count: int, side: int = 80) -> list[Source]:
    """Return images whose pixels tell the image, the row and the column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return sources(
        [torch.stack([torch.full_like(rows, i), rows, columns]).float() / 4096 for i in range(count)]
    )


def whence(crop: Tensor) -> tuple[int, int, int, bool]:
    """Return image, top, left and whether it is mirrored, after checking that the crop is in one piece."""
    number, rows, columns = (crop * 4096).round().long()
    mirrored = bool(columns[0, 0] > columns[0, -1])
    columns = columns.flip(1) if mirrored else columns
    size = crop.size(-1)
    top, left = int(rows[0, 0]), int(columns[0, 0])
    assert torch.equal(rows, torch.arange(top, top + size).unsqueeze(1).expand(size, size))
    assert torch.equal(columns, torch.arange(left, left + size).expand(size, size))
    assert (number == number[0, 0]).all()
    return int(number[0, 0]), top, left, mirrored


def test_every_image_comes_once_before_one_comes_again() -> None:
    crops = RandomCrops(numbered(7), 64, seed=0)
    origins = [whence(crops[i]) for i in range(28)]
    for epoch in range(4):
        assert sorted(number for number, *_ in origins[7 * epoch : 7 * epoch + 7]) == list(range(7))
    orders = {tuple(number for number, *_ in origins[7 * epoch : 7 * epoch + 7]) for epoch in range(4)}
    assert len(orders) > 1, "in another order"
    assert {mirrored for *_, mirrored in origins} == {True, False}
    assert len({(top, left) for _, top, left, _ in origins}) > 14


def test_crops_reach_every_border() -> None:
    crops = RandomCrops(numbered(1, side=66), 64, seed=0)
    places = {whence(crops[i])[1:3] for i in range(200)}
    assert places == {(top, left) for top in range(3) for left in range(3)}


def test_a_crop_is_a_function_of_the_seed_and_its_number_in_any_process() -> None:
    crops, again, other = (RandomCrops(numbered(5), 64, seed) for seed in (3, 3, 4))
    assert torch.equal(crops[17], again[17])
    assert any(not torch.equal(crops[i], other[i]) for i in range(5))
    here = list(batches(crops, 2, range(3, 6), workers=0))
    there = list(batches(crops, 2, range(3, 6), workers=2))
    assert torch.equal(torch.stack(here), torch.stack(there))
    assert torch.equal(here[0], torch.stack([crops[6], crops[7]]))


def test_reading_ahead_leaves_the_random_numbers_of_the_caller_alone() -> None:
    before = torch.get_rng_state()
    list(batches(RandomCrops(numbered(2), 64, seed=0), 2, range(2), workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_breaks_later_is_replaced_by_another(tmp_path: Path) -> None:
    for name, level in (("a", 0), ("b", 255)):
        Image.new("RGB", (64, 64), (level,) * 3).save(tmp_path / f"{name}.png")
    crops = RandomCrops(sources(tmp_path), 64, seed=0)
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"image skipped: .*a\.png"):
        assert all(crops[i].min() == 1 for i in range(2))
    (tmp_path / "b.png").write_bytes(b"broken")
    with (
        pytest.warns(UserWarning, match="image skipped"),
        pytest.raises(FmpqError, match="none of the 2 images"),
    ):
        crops[0]


def test_small_and_unreadable_files_are_skipped_by_name(tmp_path: Path) -> None:
    for name, size in (("small", (63, 200)), ("exact", (64, 64)), ("large", (100, 70))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"2 of 4 images skipped: .*small\.png is 63 x 200.*text\.png"):
        usable = large_enough(sources(tmp_path), 64)
    assert [Path(image.name).stem for image in usable] == ["exact", "large"]
    with pytest.raises(FmpqError, match=r"none of the 4 images.*128 x 128.*smaller crop"):
        large_enough(sources(tmp_path), 128)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (20, 2), (79, 7), (80, 8), (1000, 8)])
def test_a_tenth_is_held_out(count: int, held_out: int) -> None:
    images = numbered(1) * count
    train, validation = hold_out([Source(str(i), s.load, s.size, s.version) for i, s in enumerate(images)])
    assert len(validation) == held_out
    assert len(train) == count - held_out
    assert not {s.name for s in train} & {s.name for s in validation}


def test_one_image_is_too_few() -> None:
    with pytest.raises(FmpqError, match=r"only 1 usable image.*validation="):
        hold_out(numbered(1))
