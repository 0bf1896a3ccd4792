"""Time and memory of a step of fine-tuning, against a training step of the float model on the same batch.

Every variant runs in a process of its own, in turn, several times over; medians over all steps.

    python benchmarks/qat_step.py --train bsds500/train --threads 2
"""

import argparse
import json
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from arguments import add_model, parser_of
from figures import save
from tabulate import tabulate
from torch import nn

from fmpq_fx import prepare, samples
from fmpq_fx.history import Settings
from fmpq_fx.images import crops
from fmpq_fx.models.zoo import load_model
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.storage.files import write_text
from fmpq_fx.training.run import TrainingRun

VARIANTS = {"float32": None, "W8A32": 0, "W8A8": 8}
"""Activation bits; 0 is float activations, None a float model."""

WARM_UP = 3


def _model(args: argparse.Namespace, variant: str) -> nn.Module:
    model = load_model(args.model, checkpoint=args.checkpoint)
    bits = VARIANTS[variant]
    if bits is None:
        return model
    calibration = [torch.rand(1, 3, 64, 64)]
    return prepare(
        model, 0.25, calibration=calibration, bits=[8], planner="uniform", activation_bits=bits or None
    )


def measure(args: argparse.Namespace, variant: str) -> tuple[list[float], float]:
    """Return the seconds of each step, and how much memory training took at its peak, in bytes."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    source = args.train or list(samples.photos().values())
    (x,) = crops.cut(source, size=args.crop, count=args.batch_size)
    model, x = _model(args, variant).to(device), x.to(device)
    run = TrainingRun(model, [], Settings(0.013, bfloat16=args.bfloat16))
    before = _peak_memory(device)
    seconds = []
    with freed_memory_kept():
        for _ in range(WARM_UP + args.steps):
            start = time.perf_counter()
            run.step(x)  # reads the loss, and so waits for the device
            seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:], _peak_memory(device) - before


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print a row per variant and draw them."""
    parser = parser_of(__doc__)
    add_model(parser)
    add = parser.add_argument
    add("--train", help="image folder; default: scikit-image's photographs")
    add("--crop", type=int, default=Settings.crop)
    add("--batch-size", type=int, default=Settings.batch_size)
    add("--steps", type=int, default=12, help="timed in each round")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--bfloat16", action="store_true")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results and picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    memory: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                times, peak = process.submit(partial(measure, args), variant).result()
            seconds[variant] += times
            memory[variant].append(peak)
    _report(seconds, memory, args)


def _report(
    seconds: dict[str, list[float]], memory: dict[str, list[float]], args: argparse.Namespace
) -> None:
    median = {variant: statistics.median(times) for variant, times in seconds.items()}
    peak = {variant: statistics.median(peaks) for variant, peaks in memory.items()}
    rows = [
        [
            variant,
            f"{median[variant]:.3f}",
            f"{median[variant] / median['float32']:.2f}",
            f"{peak[variant] / 1e6:.0f}",
            f"{peak[variant] / peak['float32']:.2f}",
        ]
        for variant in VARIANTS
    ]
    headers = ["training", "step (s)", "ratio", "memory (MB)", "ratio"]
    print(
        f"{args.model}, {args.batch_size} crops of {args.crop} x {args.crop}, {args.threads} threads, {args.device}\n"
    )
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left", *["right"] * 4]))
    content = {"seconds": seconds, "bytes": memory}
    write_text(args.out / f"qat_step-{args.model}.json", json.dumps(content, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.boxplot(list(seconds.values()), tick_labels=list(seconds))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds of a step")
    save(figure, args.out / f"qat_step-{args.model}.png")


if __name__ == "__main__":
    main()
