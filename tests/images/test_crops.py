"""Finding image files, cutting calibration crops, and checking what calibration is given."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.images import crops, reading


def test_find_takes_image_files_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp", "notes.txt", "._a.jpg", "d.png.part"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert reading.find(str(tmp_path)) == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "c.webp"]


def test_find_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FmpqError, match=r"no such image folder: .*missing"):
        reading.find(tmp_path / "missing")
    with pytest.raises(FmpqError, match=r"no images in .*\.jpg, .*\.webp"):
        reading.find(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(FmpqError, match=r"a\.png is a file"):
        reading.find(tmp_path / "a.png")


def ruled(number: int, height: int, width: int) -> Tensor:
    """Return an image whose every pixel says which image it is of, and its row and column there."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, number), rows, columns]).float() / 4096


def origins(batch: Tensor) -> list[tuple[int, ...]]:
    """Return (image, top, left) of each crop of ruled images, after checking that it is cut in one piece."""
    found = [tuple(int(v) for v in crop[:, 0, 0] * 4096) for crop in batch]
    for (number, top, left), crop in zip(found, batch, strict=True):
        whole = ruled(number, top + crop.size(1), left + crop.size(2))
        assert torch.equal(crop, whole[:, top:, left:])
    return found


def test_of_many_images_evenly_spaced_ones_give_their_centre() -> None:
    (batch,) = crops.cut([ruled(i, 70, 80) for i in range(10)], size=64, count=4)
    assert batch.shape == (4, 3, 64, 64)
    assert origins(batch) == [(1, 3, 8), (3, 3, 8), (6, 3, 8), (8, 3, 8)]


def test_of_few_images_each_gives_crops_along_its_longer_side() -> None:
    (batch,) = crops.cut([ruled(0, 74, 264), ruled(1, 164, 84)], size=64, count=5)
    along_0 = [(0, 5, 0), (0, 5, 100), (0, 5, 200)]
    assert origins(batch) == [*along_0, (1, 0, 10), (1, 100, 10)]


def test_no_crop_comes_twice() -> None:
    tight, exact, roomy = ruled(0, 64, 66), ruled(1, 64, 64), ruled(2, 64, 164)
    (batch,) = crops.cut([tight], size=64, count=8)
    assert origins(batch) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    # What the small ones cannot give, the large one does.
    (batch,) = crops.cut([tight, exact, roomy], size=64, count=9)
    assert [origin[0] for origin in origins(batch)] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    (batch,) = crops.cut([ruled(0, 65, 65)], size=64, count=8, seed=0)
    assert set(origins(batch)) == {(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)}
    assert len(batch) == 4


def test_a_seed_gives_random_crops_that_can_be_had_again() -> None:
    given = [ruled(i, 200, 300) for i in range(20)]
    state = torch.get_rng_state()
    drawn = [origins(crops.cut(given, size=64, count=6, seed=seed)[0]) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state), "the caller's own random numbers must not move"
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    for part in range(3):  # image, row and column all vary within a draw
        assert len({origin[part] for origin in drawn[0]}) > 1
    assert len({origin[0] for origin in drawn[0]}) == 6, "no image serves twice while others wait"
    assert {origin[0] for origin in drawn[0]} != {origin[0] for origin in drawn[2]}


def test_random_crops_reach_every_edge() -> None:
    (batch,) = crops.cut([ruled(0, 66, 67)], size=64, count=12, seed=3)
    assert set(origins(batch)) == {(0, top, left) for top in range(3) for left in range(4)}


def test_images_below_the_size_give_multiples_of_64_in_batches_of_their_own() -> None:
    given = [ruled(0, 300, 300), ruled(1, 200, 300), ruled(2, 400, 300), ruled(3, 130, 70)]
    batches = crops.cut(given, count=4)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 256, 256), (1, 3, 192, 256), (1, 3, 128, 64)]
    assert [origins(batch) for batch in batches] == [[(0, 22, 22), (2, 72, 22)], [(1, 4, 22)], [(3, 1, 3)]]
    assert crops.describe(batches) == "2 crops of 256 x 256, 1 of 256 x 192, 1 of 64 x 128"


def test_the_multiple_can_be_chosen() -> None:
    (batch,) = crops.cut([ruled(0, 50, 40)], size=48, count=1, multiple=16)
    assert batch.shape == (1, 3, 48, 32)


def test_too_small_images_are_skipped_with_their_size() -> None:
    with pytest.warns(UserWarning, match="image 0 is 100 x 63, needed is at least 64 x 64"):
        (batch,) = crops.cut([ruled(0, 63, 100), ruled(1, 64, 64)], count=2)
    assert origins(batch) == [(1, 0, 0)]
    with pytest.raises(FmpqError, match=r"none of the 5 images .*image 1 is 30 x 20.*; and 2 more"):
        crops.cut([ruled(i, 20, 30) for i in range(5)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of ten small photographs, of which the red of number i is i."""
    for i in range(10):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def reds(batches: list[Tensor]) -> list[int]:
    return [round(float(crop[0, 0, 0]) * 255) for batch in batches for crop in batch]


def test_crops_of_a_folder(folder: Path) -> None:
    assert reds(crops.cut(folder, size=64, count=4)) == [1, 3, 6, 8]
    assert sorted(reds(crops.cut(str(folder), size=64, count=99, seed=0))) == list(range(10))


def test_an_unreadable_file_is_replaced_by_the_next_one_not_chosen(folder: Path) -> None:
    (folder / "3.png").write_text("not an image")
    (folder / "8.png").write_bytes((folder / "8.png").read_bytes()[:60])
    (folder / "9.png").unlink()
    (folder / "9.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="image skipped") as caught:
        batches = crops.cut(folder, size=64, count=4)
    assert reds(batches) == [1, 4, 6, 0], "9, the next after 8, is broken too: on from the start"
    for warning, name in zip(caught, ("3.png", "8.png", "9.png"), strict=True):
        assert f"image skipped: cannot read {folder / name}: " in str(warning.message)
        assert warning.filename == __file__, "the warning should point at the caller's line"


def test_crops_of_a_folder_where_nothing_is_usable(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text("not an image")
    with pytest.raises(FmpqError, match=r"none of the 10 images.*0\.png.*and 7 more"):
        crops.cut(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 200}, "multiple of 64, got 200"),
        ({"size": 0}, "multiple of 64, got 0"),
        ({"count": 0}, "at least 1, got 0"),
        ({"multiple": 0}, "at least 1"),
    ],
)
def test_crop_arguments_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crops.cut([ruled(0, 64, 64)], **options)


def test_crops_of_what_are_no_images() -> None:
    with pytest.raises(ValueError, match="the sequence is empty"):
        crops.cut([])
    with pytest.raises(TypeError, match=r"image 1 is torch\.uint8"):
        crops.cut([ruled(0, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_default_calibration_is_eight_crops_of_the_sample_photographs() -> None:
    (batch,) = crops.batches(None)
    assert batch.shape == (8, 3, 256, 256)
    assert len({float(crop.mean()) for crop in batch}) == 8
    assert crops.describe([batch]) == "8 crops of 256 x 256"


def test_calibration_from_a_folder(folder: Path) -> None:
    assert reds(crops.batches(folder)) == reds(crops.cut(folder))


def test_calibration_tensors_become_batches_of_float32() -> None:
    image = ruled(0, 64, 128)
    batch = torch.stack([image, image])

    def loader() -> Iterator[Tensor]:
        yield image
        yield batch.double().requires_grad_()

    for given, sizes in ((image, [1]), (batch, [2]), ([batch, image], [2, 1]), (loader(), [1, 2])):
        checked = crops.batches(given)
        assert [len(b) for b in checked] == sizes
        assert all(torch.equal(b, image.expand_as(b)) for b in checked)
        assert all(b.dtype == torch.float32 and not b.requires_grad for b in checked)


def test_rounding_beyond_the_range_is_let_pass() -> None:
    assert crops.batches(torch.full((1, 3, 8, 8), 1 + 1e-6))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (7, TypeError, "calibration is a int; expected an image folder"),
        ([], ValueError, "calibration is empty"),
        ([ruled(0, 8, 8), "photo.png"], TypeError, "calibration batch 1 is a str"),
        ([[ruled(0, 8, 8), 1]], TypeError, r"batch 0 is a list.* pairs pass the images"),
        (np.zeros((1, 3, 8, 8), np.float32), TypeError, "batch 0 is a ndarray"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"torch\.uint8.*divide 8-bit values by 255"),
        (torch.zeros(8, 8), ValueError, r"shape \(8, 8\), expected \(B, C, H, W\)"),
        (torch.zeros(2, 5, 8, 8), ValueError, r"shape \(2, 5, 8, 8\), .*from 1 to 4 channels"),
        ([ruled(0, 8, 8), torch.zeros(1, 8, 8)], ValueError, "1 and 3 channels; a model takes one kind"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"shape \(2, 8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"shape \(0, 3, 8, 8\), which holds no pixels"),
        (torch.full((1, 3, 8, 8), 255.0), ValueError, "255 to 255, expected .*divide by 255"),
        (torch.full((1, 3, 8, 8), -1.0), ValueError, "-1 to -1, expected .*normalization"),
        (torch.full((1, 3, 8, 8), 1.1), ValueError, "1.1 to 1.1, expected .*clamp"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "calibration contains NaN"),
        (torch.full((1, 3, 8, 8), float("inf")), ValueError, "inf"),
    ],
)
def test_calibration_that_is_none(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        crops.batches(given)  # type: ignore[arg-type]


def test_one_nan_among_good_values_is_found() -> None:
    image = ruled(0, 8, 8)
    image[1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        crops.batches(image)


def test_describe() -> None:
    assert crops.describe([torch.zeros(1, 3, 64, 128)]) == "1 crop of 128 x 64"
    mixed = [torch.zeros(2, 3, 64, 64), torch.zeros(1, 3, 64, 128), torch.zeros(9, 3, 64, 64)]
    assert crops.describe(mixed) == "11 crops of 64 x 64, 1 of 128 x 64"
    assert crops.describe([]) == "no crops"


def test_ranges_are_seen_on_more_of_a_folder_but_not_of_given_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (300, 280)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is wrong with an image is said once, by batches()
        further = crops.more(tmp_path, 7)
    assert crops.describe(further) == "7 crops of 256 x 256"
    assert crops.more([torch.zeros(1, 3, 64, 64)]) == []
    assert sum(map(len, crops.more(None, 9))) == 9
