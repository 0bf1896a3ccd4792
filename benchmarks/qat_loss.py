"""The same plans fine-tuned with the RD loss and with MSE alone, measured on real bitstreams.

    python benchmarks/qat_loss.py --lmbda 0.013 --calibration bsds500/val --train bsds500/train --images kodak

Every result is kept as soon as it is there, in the files of bd_rate.py, whose points it takes where it can.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from arguments import parser_of
from figures import save
from rd_bench import add_arguments, benches
from rd_points import Point, Variant
from tabulate import tabulate

from fmpq_fx.passes.measure.allocator import freed_memory_kept

COLOURS = {"before": "tab:gray", "rd": "tab:blue", "mse": "tab:red"}


def _name(variant: Variant) -> str:
    return variant.loss if variant.steps else "before"


def main() -> None:
    """Measure missing points, and print and draw all points."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--planner", default="adaptive")
    parser.add_argument("--target-cr", type=float, nargs="+", default=[0.1875, 0.125])
    parser.add_argument("--activation-bits", type=int, default=8, help="0 is float")
    args = parser.parse_args()
    points: list[Point] = []
    with freed_memory_kept():
        for bench in benches(args):
            for cr in args.target_cr:
                plan = args.planner, cr, args.activation_bits or None
                points += bench.measure(
                    [Variant(*plan), Variant(*plan, args.steps), Variant(*plan, args.steps, "mse")]
                )
    rows = []
    for before, by_rd, by_mse in zip(*[iter(points)] * 3, strict=True):
        for point in (before, by_rd, by_mse):
            rows.append(
                [
                    f"{point.lmbda:g}",
                    f"{point.variant.target_cr:g}",
                    f"W{point.weight_bits:.2f}A{point.variant.activation_bits or 32}",
                    _name(point.variant),
                    f"{point.bpp:.4f}",
                    f"{point.psnr:.3f}",
                    f"{point.rd_loss:.4f}",
                    f"{100 * (point.rd_loss / before.rd_loss - 1):+.2f} %",
                ]
            )
    headers = ["lambda", "CR", "bits", "fine-tuned with", "bpp", "PSNR (dB)", "RD loss", "change"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["right"] * 8))
    path = args.out / f"qat_loss-{args.model}.png"
    _plot(points, path)
    print(f"\nRD loss = real bits per pixel + lambda * MSE of 8-bit images. Picture: {path}")


def _plot(points: list[Point], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for point in points:
        axes.plot(point.bpp, point.psnr, "o", color=COLOURS[_name(point.variant)])
        label = f"{_name(point.variant)}, CR {point.variant.target_cr:g}"
        axes.annotate(label, (point.bpp, point.psnr), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel("bits per pixel, real bitstreams")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.margins(0.2)
    save(figure, path)


if __name__ == "__main__":
    main()
