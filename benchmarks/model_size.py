"""Model files: bytes against general-purpose compressors, RD loss over bytes, and the time to load one.

For every size, planned in nominal and in coded bytes: what the weights take nominally, in the model file, and as
plain integers (a byte each, or two above 8 bits) through gzip, xz and zstd; the whole file beside the float
checkpoint; and the RD loss above float32, before any fine-tuning, activations float.

    python benchmarks/model_size.py --calibration ../data/bsds500/val --images ../data/kodak
"""

import gzip
import io
import json
import lzma
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import zstandard
from arguments import add_model, parser_of
from figures import save as save_figure
from tabulate import tabulate
from torch import fx, nn

from fmpq_fx import FileReport, analyze, file_report, load, load_codec, plan_of, prepare, save
from fmpq_fx.images import crops
from fmpq_fx.models.zoo import load_model, model_of_state, zoo_name
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.trace import trace
from fmpq_fx.progress import reported
from fmpq_fx.quant import quantized_layers
from fmpq_fx.storage.files import write_text

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd": lambda data: zstandard.compress(data, 22),
}


@dataclass(frozen=True)
class Row:
    """One model file."""

    counted: str  # what the target counts: "nominal" or "coded"
    target_cr: float
    bits: float  # average
    nominal: float  # bytes
    coded: int  # bytes, with their side information
    others: dict[str, int]  # bytes of the integers by compressor
    file: int  # bytes
    overhead: float  # part of the file that is neither coded weights nor float parameters and tables
    rd: float  # RD loss above float, fraction


def main() -> None:
    """Print the tables, write them as JSON, and draw RD loss over file bytes."""
    parser = parser_of(__doc__)
    add_model(parser)
    add = parser.add_argument
    add("--calibration", help="image folder; default: scikit-image's photographs")
    add("--images", required=True, help="image folder to measure the RD loss on")
    add("--lmbda", type=float, default=0.013)
    add("--planner", default="optimal")
    add("--target-cr", type=float, nargs="+", default=[0.25, 0.1875, 0.15625, 0.125, 0.0833])
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results and the picture")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, checkpoint=args.checkpoint)
    calibration, test = crops.batches(args.calibration), crops.cut(args.images, count=24)
    table = analyze(model, calibration=calibration, lmbda=args.lmbda)
    float_model = trace(model)
    bench = make_bench(float_model, test)
    float_rd = mean_rd(float_model, bench, args.lmbda)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(size, cr) for size in ("nominal", "coded") for cr in args.target_cr]
        for size, cr in reported(jobs, "model files", "file", leave=True):
            gm = prepare(
                model,
                cr,
                calibration=calibration,
                sensitivity=table,
                planner=args.planner,
                size=size,
                activation_bits=None,
            )
            path = Path(folder) / f"{size}-{cr}.fmpq"
            save(gm, path)
            rd = mean_rd(gm, bench, args.lmbda) / float_rd - 1
            rows.append(_row(size, cr, gm, file_report(path), rd))
        times = _times(model, [Path(folder) / f"coded-{cr}.fmpq" for cr in args.target_cr])
    checkpoint = _float_checkpoint(model)
    about = (
        f"{args.model}, {args.planner}, A32; RD loss on {crops.describe(test)}; float checkpoint "
        f"{len(checkpoint):,} bytes"
    )
    print(f"{about}\n\n{_table(rows)}\n\n{_time_table(times)}")
    content = {"about": about, "rows": list(map(asdict, rows)), "seconds": times}
    write_text(args.out / f"model_size-{args.model}.json", json.dumps(content, indent=1) + "\n")
    picture = args.out / f"model_size-{args.model}.png"
    _plot(rows, picture)
    print(f"\npicture: {picture}")


def _row(size: str, cr: float, gm: fx.GraphModule, report: FileReport, rd: float) -> Row:
    integers = b"".join(
        layer.integers.numpy().astype(np.int8 if layer.bits <= 8 and layer.signed else np.int16).tobytes()
        for layer in quantized_layers(gm).values()
    )
    others = {name: len(compress(integers)) for name, compress in COMPRESSORS.items()}
    return Row(
        size,
        cr,
        plan_of(gm).average_bits,
        report.nominal,
        report.coded + report.side,
        others,
        report.size,
        report.overhead,
        rd,
    )


def _float_checkpoint(model: nn.Module) -> bytes:
    """Return the parameters as ``torch.save`` writes them, without the CDF tables, which are as large."""
    file = io.BytesIO()
    torch.save({k: v for k, v in model.state_dict().items() if not k.endswith("_quantized_cdf")}, file)
    return file.getvalue()


def _times(model: nn.Module, paths: list[Path]) -> dict[str, float]:
    """Return the median seconds of loading, each measured in turn with the others."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "float.pth"
        torch.save(model.state_dict(), checkpoint)

        def ready() -> None:
            name = zoo_name(model)
            assert name is not None
            model_of_state(name, torch.load(checkpoint, weights_only=True)).update(force=True)  # type: ignore[operator]

        tasks: dict[str, Callable[[], Any]] = {
            "torch.load of the float checkpoint": lambda: torch.load(checkpoint, weights_only=True),
            "and a model made of it, ready to code": ready,
        }
        for path in paths:
            tasks[f"load_codec, {path.stem}"] = lambda path=path: load_codec(path)  # type: ignore[misc]
            tasks[f"load, {path.stem}"] = lambda path=path: load(path)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(5):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _table(rows: list[Row]) -> str:
    cells = [
        [
            row.counted,
            f"{row.target_cr:g}",
            f"W{row.bits:.2f}A32",
            f"{row.nominal:,.0f}",
            f"{row.coded:,}",
            f"{100 * (row.coded / row.nominal - 1):+.1f} %",
            *(f"{100 * (row.others[name] / row.nominal - 1):+.1f} %" for name in COMPRESSORS),
            f"{row.file:,}",
            f"{100 * row.overhead:.2f} %",
            f"{100 * row.rd:+.2f} %",
        ]
        for row in rows
    ]
    headers = [
        "planned in",
        "CR",
        "bits",
        "nominal bytes",
        "coded",
        "to nominal",
        *COMPRESSORS,
        "file",
        "overhead",
        "RD loss",
    ]
    return tabulate(cells, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def _time_table(seconds: dict[str, float]) -> str:
    base = next(iter(seconds.values()))
    rows = [[name, f"{1000 * value:.1f}", f"{value / base:.1f}"] for name, value in seconds.items()]
    return tabulate(
        rows, ["loading", "ms", "ratio"], disable_numparse=True, colalign=("left", "right", "right")
    )


def _plot(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for counted, style in (("nominal", "o--"), ("coded", "s-")):
        mine = sorted((row for row in rows if row.counted == counted), key=lambda row: row.file)
        axes.plot(
            [row.file / 1e3 for row in mine],
            [100 * max(row.rd, 1e-4) for row in mine],
            style,
            label=f"planned in {counted} bytes",
        )
        for row in mine:
            label = f"{row.target_cr:g}"
            axes.annotate(
                label,
                (row.file / 1e3, 100 * max(row.rd, 1e-4)),
                fontsize=8,
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set(xlabel="bytes of the model file, thousands", ylabel="RD loss above float32, %", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
