"""Reading image files of every kind."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.images import reading

RGB = np.array(
    [[[0, 1, 2], [50, 100, 150]], [[255, 254, 253], [7, 8, 9]], [[30, 20, 10], [0, 0, 0]]], np.uint8
)
WIDE = np.array(
    [[0, 255, 256], [32896, 65279, 65535]], np.uint16
)  # an 8-bit reading would clip or fold these


def planes(pixels: NDArray[np.generic], peak: int = 255) -> Tensor:
    """Return pixels (H, W) or (H, W, 3) as the tensor that `read` should give."""
    colour = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=2)
    return torch.tensor(colour.astype(np.float32) / np.float32(peak)).permute(2, 0, 1)


def png16(path: Path, pixels: NDArray[np.uint16], colour_type: int, transparent: int | None = None) -> Path:
    """Write a 16-bit PNG by the letter of its standard, because Pillow writes none in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    body = chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_rgb_is_channels_first_and_divided_by_255(tmp_path: Path) -> None:
    read = reading.read(saved(tmp_path / "a.png", Image.fromarray(RGB)))
    assert read.dtype == torch.float32
    assert read.is_contiguous()
    assert torch.equal(read, planes(RGB))


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    assert torch.equal(reading.read(str(saved(tmp_path / "a.png", Image.fromarray(RGB)))), planes(RGB))


def test_gray_becomes_three_equal_channels(tmp_path: Path) -> None:
    gray = RGB[:, :, 0]
    assert torch.equal(reading.read(saved(tmp_path / "a.png", Image.fromarray(gray))), planes(gray))


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    assert torch.equal(reading.read(saved(tmp_path / "a.png", Image.fromarray(bits))), planes(bits, peak=1))


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    # Opaque stays as it is to the last bit, transparent is white, a fifth of opaque a fifth of the colour.
    pixels = np.array([[[200, 100, 3, 255], [200, 100, 3, 0], [200, 100, 0, 51]]], np.uint8)
    read = reading.read(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert torch.equal(read[:, 0, 0], torch.tensor([200, 100, 3]) / 255)
    assert torch.equal(read[:, 0, 1], torch.ones(3))
    expected = torch.tensor([200, 100, 0]) / 255 * 0.2 + 0.8
    torch.testing.assert_close(read[:, 0, 2], expected, rtol=0, atol=1e-7)


def test_transparency_of_gray(tmp_path: Path) -> None:
    pixels = np.array([[[90, 255], [90, 0]]], np.uint8)
    read = reading.read(saved(tmp_path / "a.png", Image.fromarray(pixels, mode="LA")))
    assert torch.equal(read, planes(np.array([[90, 255]])))


def test_palette(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]])
    assert torch.equal(reading.read(saved(tmp_path / "a.png", image)), planes(expected))
    expected[:, 1] = 255  # entry 1 declared transparent
    assert torch.equal(reading.read(saved(tmp_path / "b.png", image, transparency=1)), planes(expected))


def test_one_colour_declared_transparent(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(RGB), transparency=(50, 100, 150))
    expected = RGB.copy()
    expected[0, 1] = 255
    assert torch.equal(reading.read(path), planes(expected))


def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    expected = planes(WIDE, peak=65535)
    assert torch.equal(reading.read(png16(tmp_path / "a.png", WIDE, colour_type=0)), expected)
    assert torch.equal(reading.read(saved(tmp_path / "a.tif", Image.fromarray(WIDE))), expected)
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + WIDE.astype(">u2").tobytes())  # Pillow's mode I
    assert torch.equal(reading.read(tmp_path / "a.pgm"), expected)


def tiff(path: Path, pixels: NDArray[np.integer], *, signed: bool = False, black: int = 0) -> Path:
    """Write a 16-bit TIFF whose tags say that its values have a sign, or that ``black`` is the largest of them."""
    image = Image.fromarray(pixels.astype(np.uint16))
    image.save(path, "TIFF", tiffinfo={339: 2 if signed else 1, 262: 0 if black else 1})
    return path


@pytest.mark.parametrize("brightest", [1, 200, 255])
def test_dark_images_stay_dark_whatever_their_brightest_value(tmp_path: Path, brightest: int) -> None:
    dark = np.minimum(WIDE, brightest).astype(np.uint16)
    expected = planes(dark, peak=65535)
    assert torch.equal(reading.read(tiff(tmp_path / "a.tif", dark)), expected)
    assert torch.equal(reading.read(png16(tmp_path / "a.png", dark, colour_type=0)), expected)


def test_12_bit_gray_is_scaled_by_12_bits(tmp_path: Path) -> None:
    values = np.array([[0, 1, 4095, 2048]], np.uint16)
    path = saved(tmp_path / "a.tif", Image.fromarray(np.zeros((1, 3), np.uint16)))
    packed = sum(int(value) << 12 * (3 - place) for place, value in enumerate(values[0])).to_bytes(6, "big")
    data = bytearray(path.read_bytes())
    with Image.open(path) as image:
        offset = image.tag_v2[273][0]
    data[offset : offset + 6] = packed
    for tag, kind, value in ((258, 3, 12), (256, 4, 4)):  # depth and width, where Pillow wrote 16 and 3
        entry = data.index(struct.pack("<HH", tag, kind))
        data[entry + 8 : entry + 10] = struct.pack("<H", value)
    path.write_bytes(data)
    assert torch.equal(reading.read(path), planes(values, peak=4095))


def test_16_bit_gray_whose_zero_is_white(tmp_path: Path) -> None:
    assert torch.equal(
        reading.read(tiff(tmp_path / "a.tif", 65535 - WIDE, black=65535)), planes(WIDE, peak=65535)
    )


def test_16_bit_gray_with_a_transparent_level(tmp_path: Path) -> None:
    expected = planes(np.where(WIDE == 256, np.uint16(65535), WIDE), peak=65535)
    assert torch.equal(
        reading.read(png16(tmp_path / "a.png", WIDE, colour_type=0, transparent=256)), expected
    )


def test_16_bit_colour_keeps_at_least_the_upper_8_bits(tmp_path: Path) -> None:
    colour = np.stack([WIDE, WIDE[::-1], WIDE[:, ::-1]], axis=2)
    read = reading.read(png16(tmp_path / "a.png", colour, colour_type=2))
    assert float((read - planes(colour, peak=65535)).abs().max()) < 1 / 255
    assert read.max() == 1
    assert read.min() == 0


def test_cmyk_is_converted(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 255, 255, 0]]], np.uint8)
    read = reading.read(saved(tmp_path / "a.tif", Image.fromarray(inks, mode="CMYK")))
    assert torch.equal(read, planes(np.array([[[255] * 3, [0] * 3, [0, 255, 255], [255, 0, 0]]])))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, orientation: int, upright: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(RGB), exif=exif)
    assert torch.equal(reading.read(path), planes(upright(RGB)))


def broken_jpeg(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def broken_png(path: Path) -> None:
    png16(path, np.arange(4096, dtype=np.uint16).reshape(64, 64), colour_type=0)
    path.write_bytes(path.read_bytes()[:100])


def fits(path: Path) -> None:
    """Write a picture of astronomers, whose 16 bits are a count of photons or anything else."""
    cards = {"SIMPLE": "T", "BITPIX": "16", "NAXIS": "2", "NAXIS1": "3", "NAXIS2": "2"}
    header = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END"
    path.write_bytes(header.ljust(2880).encode() + WIDE.tobytes().ljust(2880, b"\0"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_text("no pixels here"), "not an image"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (broken_jpeg, "truncated"),
        (broken_png, "truncated"),
        (lambda path: Image.fromarray(WIDE.astype(np.float32)).save(path, "TIFF"), "floats of unknown range"),
        (lambda path: Image.fromarray(WIDE.astype(np.int32) + 1).save(path, "TIFF"), "32 bits"),
        (lambda path: Image.fromarray(-WIDE.astype(np.int32)).save(path, "TIFF"), "32 bits"),
        (lambda path: Image.fromarray(WIDE.astype(np.int32) // 256).save(path, "TIFF"), "32 bits"),
        (fits, "what value is white"),
        (lambda path: tiff(path, WIDE // 2, signed=True), "16 bits, with a sign"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises(FmpqError, match=message) as caught:
        reading.read(path)
    assert str(path) in str(caught.value)


def test_an_image_of_few_colours_is_read_and_not_written(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.gif", Image.new("RGB", (4, 3), "red"))
    (source,) = reading.sources(tmp_path)
    assert torch.equal(source.load(), reading.read(path))
    with pytest.raises(ValueError, match=r"cannot write b\.gif: expected one of \.bmp"):
        reading.check_writable("b.gif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_all_but_the_first_of_several_images_would_be_lost(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "green", "blue")]
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(FmpqError, match=rf"a\.{suffix}: it holds 3 images"):
        reading.read(path)
    (source,) = reading.sources(tmp_path)
    with pytest.raises(FmpqError, match="it holds 3 images"):  # before training begins
        source.size()


def test_the_preview_in_a_cameras_file_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(RGB).save(path, "MPO", save_all=True, append_images=[Image.fromarray(RGB[:1])])
    assert reading.read(path).shape == (3, *RGB.shape[:2])


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "bomb.png", Image.new("RGB", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)  # Pillow refuses more than twice this
    with pytest.raises(FmpqError, match=r"bomb\.png: .*exceeds limit"):
        reading.read(path)


def test_no_image_of_a_folder_is_passed_over_in_silence(tmp_path: Path) -> None:
    readable = ["a.JP2", "b.tga", "c.pgm", "d.avif", "e.jfif"]
    for name in readable[:3]:
        saved(tmp_path / name, Image.new("RGB", (64, 64), "red"))
    saved(tmp_path / readable[4], Image.new("RGB", (64, 64), "red"), format="JPEG")
    for name in (readable[3], "f.heic", "g.jxl"):  # not every Pillow reads these
        (tmp_path / name).write_bytes(b"pixels of another kind")
    (tmp_path / "notes.txt").write_text("no image")
    found = reading.find(tmp_path)
    assert [path.name for path in found] == [*readable, "f.heic", "g.jxl"]
    for path in found:
        if path.suffix in (".avif", ".heic", ".jxl"):
            with pytest.raises(FmpqError, match=f"cannot read .*{path.name}"):
                reading.read(path)
        else:
            assert reading.read(path).shape == (3, 64, 64)
