"""Time of prepare() and of a step of fine-tuning: several processes of torchrun against one with as many threads.

Both variants run in turn, several times over; medians. Starting the processes is not counted.

    python benchmarks/ranks.py --images bsds500/val --processes 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from arguments import add_model, parser_of
from tabulate import tabulate

from fmpq_fx import prepare, ranks, samples
from fmpq_fx.history import Settings
from fmpq_fx.images import crops
from fmpq_fx.models.zoo import load_model
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.training.run import TrainingRun

WARM_UP = 3  # steps


def measure(args: argparse.Namespace) -> None:
    """Write the seconds of prepare() and of each step, as this process saw them, to the file ``args.measure``."""
    torch.set_num_threads(args.threads)
    source = args.images or list(samples.photos().values())
    with ranks.joined(args.device) as device:
        model = load_model(args.model, checkpoint=args.checkpoint).to(device)
        calibration = crops.cut(source, count=args.crops)
        (x,) = crops.cut(source, size=Settings.crop, count=args.batch_size)
        x = x[ranks.current().rank :: ranks.current().count].to(device)
        start = time.perf_counter()
        gm = prepare(model, 0.1875, calibration=calibration, lmbda=0.013, progress=False)
        seconds = {"prepare": [time.perf_counter() - start], "step": []}
        run = TrainingRun(gm, [], Settings(0.013, batch_size=args.batch_size), ranks=ranks.current())
        run.join()
        with freed_memory_kept():
            for _ in range(WARM_UP + args.steps):
                start = time.perf_counter()
                run.step(x)  # reads the loss, and so waits for the device
                seconds["step"].append(time.perf_counter() - start)
        if ranks.is_first():
            args.measure.write_text(json.dumps({**seconds, "step": seconds["step"][WARM_UP:]}))


def run(processes: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds that :func:`measure` writes in one of ``processes`` that share the threads."""
    threads = args.processes // processes
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        options = [*sys.argv[1:], "--measure", str(result), "--threads", str(threads)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *options]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        seconds: dict[str, list[float]] = json.loads(result.read_text())
        return seconds


def main() -> None:
    """Print a row per variant."""
    parser = parser_of(__doc__)
    add_model(parser)
    add = parser.add_argument
    add("--images", help="image folder; default: scikit-image's photographs")
    add("--processes", type=int, default=2, help="of torchrun, and threads of the one process")
    add("--crops", type=int, default=8, help="to calibrate on, 256 x 256")
    add("--batch-size", type=int, default=Settings.batch_size, help="crops in a step, 192 x 192")
    add("--steps", type=int, default=12, help="timed in each round")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu")
    add("--measure", type=Path, help=argparse.SUPPRESS)  # how this script calls itself
    add("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args)
        return
    variants = (1, args.processes)
    seconds: dict[int, dict[str, list[float]]] = {n: {"prepare": [], "step": []} for n in variants}
    for _ in range(args.rounds):
        for processes in variants:
            for name, times in run(processes, args).items():
                seconds[processes][name] += times
    median = {n: {name: statistics.median(times) for name, times in seconds[n].items()} for n in variants}
    rows = []
    for n in variants:
        rows.append([f"{n} x {args.processes // n}"])
        for name, value in median[n].items():
            rows[-1] += [f"{value:.3f}", f"{value / median[1][name]:.2f}"]
    headers = ["processes x threads", "prepare (s)", "ratio", "step (s)", "ratio"]
    print(f"{args.model}, {args.crops} crops, {args.batch_size} crops in a step, {args.device}\n")
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left", *["right"] * 4]))


if __name__ == "__main__":
    main()
