"""From end to end: load a codec, encode and decode a folder, beside CompressAI's float codec, JPEG XL and AVIF.

All codecs take turns in one run, image by image, so that a busy machine slows all of them alike; medians over the
rounds. Encoding begins and decoding ends with 8-bit pixels in memory; reading and writing files is the same for all.
"Load" is load_codec() of a model file, and torch.load() and load_state_dict() of the float model, which is there
already. JPEG XL and AVIF have their default effort and speed, and the quality whose bits per pixel come closest to
those of ours. Bits per pixel and PSNR are means over the images.

    python benchmarks/end_to_end.py --images ../data/kodak --checkpoint model.pth
"""

import argparse
import functools
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parser_of
from machine import processor
from sides import Float, Ours, Pillow, Pixels, Side, pillow_sides, pixels_of
from tabulate import tabulate
from torch import nn

from fmpq_fx import FmpqError, plan_of, prepare, samples, save
from fmpq_fx.images import reading
from fmpq_fx.models.zoo import load_model
from fmpq_fx.onnx.codec import BACKENDS
from fmpq_fx.passes.plan.planners import PLANNERS
from fmpq_fx.rd import PEAK, psnr
from fmpq_fx.report.table import short_bits


def closest(side: Pillow, bpp: float, pictures: Sequence[Pixels]) -> Pillow:
    """Return ``side`` at the quality whose mean bits per pixel come closest to ``bpp``; they grow with the quality."""

    @functools.cache
    def rate(quality: int) -> float:
        tried = side.at(quality)
        return statistics.fmean(_bpp(tried, tried.encode(p), p) for p in pictures)

    low, high = 0, 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rate(middle) < bpp else (low, middle)
    return side.at(min((low, high), key=lambda quality: abs(rate(quality) - bpp)))


@dataclass(frozen=True)
class Row:
    """The measurements of a side; seconds are for all images."""

    name: str
    bpp: float
    psnr: float  # dB
    load: float | None
    encode: float
    decode: float


def measure(sides: Sequence[Side], pictures: Sequence[Pixels], rounds: int) -> list[Row]:
    """Return a row per side, with the medians over ``rounds``, in which all sides take turns."""
    judged = [_judge(side, pictures) for side in sides]  # and nothing is done for the first time afterwards
    seconds = [_round(sides, pictures) for _ in range(rounds)]
    rows = []
    for index, side in enumerate(sides):
        load, *coding = (statistics.median(took[index][what] for took in seconds) for what in range(3))
        rows.append(Row(side.name, *judged[index], load if side.loads else None, *coding))
    return rows


def _judge(side: Side, pictures: Sequence[Pixels]) -> tuple[float, float]:
    """Return the means of bits per pixel and PSNR."""
    bits, psnrs = [], []
    for picture in pictures:
        coded = side.encode(picture)
        bits.append(_bpp(side, coded, picture))
        error = picture.astype(np.float64) - side.decode(coded)
        psnrs.append(psnr(float(np.square(error).mean()), PEAK))
    return statistics.fmean(bits), statistics.fmean(psnrs)


def _bpp(side: Side, coded: Any, picture: Pixels) -> float:
    return 8 * side.size(coded) / (picture.shape[0] * picture.shape[1])


def _round(sides: Sequence[Side], pictures: Sequence[Pixels]) -> list[list[float]]:
    """Return the seconds that each side takes to load, and to encode and decode all pictures."""
    seconds = [[_timed(side.load)[0], 0.0, 0.0] for side in sides]
    for picture in pictures:
        for side, took in zip(sides, seconds, strict=True):
            encoding, coded = _timed(side.encode, picture)
            decoding, _ = _timed(side.decode, coded)
            took[1] += encoding
            took[2] += decoding
    return seconds


def _timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = call(*args)
    return time.perf_counter() - start, out


def table(rows: Sequence[Row], pictures: Sequence[Pixels]) -> str:
    """Return the table of ``rows``."""
    megapixels = sum(p.shape[0] * p.shape[1] for p in pictures) / 1e6
    lines = []
    for row in rows:
        line = [
            row.name,
            f"{row.bpp:.4f}",
            f"{row.psnr:.2f}",
            "-" if row.load is None else f"{row.load:.3f} s",
        ]
        for seconds in (row.encode, row.decode):
            line += [f"{seconds / len(pictures):.3f} s", f"{seconds / megapixels:.3f} s"]
        lines.append(line)
    headers = ["codec", "bpp", "PSNR (dB)", "load", "encode", "per MP", "decode", "per MP"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 7))


def main() -> None:
    """Print the table, and the machine and images it was measured on."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--images", help="image folder; default: scikit-image's photographs")
    add("--model", default="bmshj2018-hyperprior", help="of CompressAI's zoo, that --checkpoint is of")
    add("--checkpoint", type=Path, help="trained weights; default: those of the sample model")
    add("--calibration", help="image folder; default: scikit-image's photographs")
    add("--target-cr", type=float, default=0.25)
    add("--planner", choices=PLANNERS, default="uniform")
    add("--lmbda", type=float, default=0.013)
    add("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    add("--threads", type=int, default=1, help="of every codec")
    add("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    photos = map(reading.read, reading.find(args.images)) if args.images else samples.photos().values()
    pictures = [pixels_of(photo) for photo in photos]
    model: Any = (
        samples.model() if args.checkpoint is None else load_model(args.model, checkpoint=args.checkpoint)
    )
    model.update()
    with tempfile.TemporaryDirectory() as temporary:
        learned = _learned(model, args, Path(temporary))
        bpp = _judge(learned[0], pictures)[0]
        sides = [*learned, *(closest(side, bpp, pictures) for side in pillow_sides(args.threads))]
        rows = measure(sides, pictures, args.rounds)
    print(
        f"processor: {processor()}, {args.threads} thread{'s' * (args.threads > 1)}, torch {torch.__version__}"
    )
    sizes = Counter(f"{p.shape[1]} x {p.shape[0]}" for p in pictures)
    print(
        f"images: {', '.join(f'{count} of {size}' for size, count in sizes.items())}; {args.rounds} rounds\n"
    )
    print(table(rows, pictures))


def _learned(model: nn.Module, args: argparse.Namespace, folder: Path) -> list[Side]:
    """Return ours, in each backend that is installed, and the float model."""
    gm = prepare(model, args.target_cr, calibration=args.calibration, lmbda=args.lmbda, planner=args.planner)
    print(f"{type(model).__name__}, {args.planner}, {short_bits(plan_of(gm))}", flush=True)
    file = folder / "model.fmpq"
    save(gm, file)
    found: list[Side] = []
    for backend in args.backend:
        try:
            found.append(Ours(file, backend, args.threads))
        except FmpqError as error:
            print(f"{backend} is left out: {error}")
    return [*found, Float(model, folder)]


if __name__ == "__main__":
    main()
