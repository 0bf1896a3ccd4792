"""Time and memory of ``analyze`` and ``prepare`` against the naive loop, and how they grow with images and sites.

The naive loop runs the whole model once for each site and bit-width. Of it, evenly spread evaluations are timed and
scaled up to all (``--naive``). Every measurement has a process of its own, which counts its CPU time and the growth of
its resident memory (Linux).

    python benchmarks/scaling.py --images ../data/bsds500/val --models sample "scale 128" "cheng2020-anchor 64"
"""

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from arguments import activation_bits, parser_of
from bench_models import add_model_arguments, enliven
from compressai.models import Cheng2020Anchor, MeanScaleHyperprior, ScaleHyperprior
from machine import processor
from tabulate import tabulate
from torch import Tensor, nn

from fmpq_fx import analyze, plan_of, prepare, samples
from fmpq_fx.images import crops
from fmpq_fx.images.reading import evenly_spaced
from fmpq_fx.memory import bytes_of, spelled
from fmpq_fx.models.zoo import load_model
from fmpq_fx.passes.measure.sensitivity import CANDIDATE_BITS
from fmpq_fx.passes.plan.widths import MIXED
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.swap import substituted
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import quantize_layer
from fmpq_fx.rd import rd_sums

MODELS: dict[str, Callable[[], nn.Module]] = {
    "sample": samples.model,
    "mbt2018-mean": lambda: MeanScaleHyperprior(64, 96),
    "scale 128": lambda: ScaleHyperprior(128, 192),
    "mean-scale 128": lambda: MeanScaleHyperprior(128, 192),
    "cheng2020-anchor 64": lambda: Cheng2020Anchor(64),
}
PHASES = {
    "_measure_and_plan": "sensitivity",
    "choose_scales": "weight scales",
    "calibrate": "activation ranges",
}
LMBDA = 0.013
Row = dict[str, float]


def make_model(name: str, x: Tensor, checkpoints: Mapping[str, str]) -> Any:
    """Return the model called ``name``; untrained ones have latents for ``x`` of a trained one's size."""
    if name in checkpoints:
        return load_model(name, checkpoint=checkpoints[name]).eval()
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    if name != "sample":
        enliven(model, x)
    return model


def forward(model: nn.Module, x: Tensor, options: argparse.Namespace) -> Row:
    """Run the model once."""
    with torch.no_grad():
        model(x)
    return {}


def naive(model: nn.Module, x: Tensor, options: argparse.Namespace) -> Row:
    """Run the naive loop, or evenly spread evaluations of it; the row has the factor to scale them up by."""
    every = list(product(find_sites(trace(model)), CANDIDATE_BITS))
    chosen = [every[i] for i in evenly_spaced(len(every), min(len(every), options.naive or len(every)))]
    with torch.no_grad():
        for site, bits in chosen:
            with substituted(model, {site.name: quantize_layer(model.get_submodule(site.name), bits)}):
                rd_sums(model(x), x).rd(LMBDA)
    return {"factor": len(every) / len(chosen)}


def analysis(model: nn.Module, x: Tensor, options: argparse.Namespace) -> Row:
    """Measure the whole table."""
    table = analyze(model, calibration=x, lmbda=LMBDA, memory=options.memory, progress=False)
    return {"sites": len(table.sites)}


def preparation(model: nn.Module, x: Tensor, options: argparse.Namespace) -> Row:
    """Prepare the model; the row has the seconds of each phase."""
    module, seconds = sys.modules["fmpq_fx.pipeline"], dict.fromkeys(PHASES.values(), 0.0)

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            result = function(*arguments, **options)
            seconds[phase] += time.process_time() - start
            return result

        return call

    for name, phase in PHASES.items():
        setattr(module, name, timed(getattr(module, name), phase))
    gm = prepare(
        model,
        options.target,
        calibration=x,
        lmbda=LMBDA,
        activation_bits=options.activation_bits,
        memory=options.memory,
        progress=False,
    )
    assert plan_of(gm).measured is not None
    return seconds


JOBS = {job.__name__: job for job in (forward, naive, analysis, preparation)}


def measured(job: str, name: str, x: Tensor, options: argparse.Namespace) -> Row:
    """Return the result of ``job`` in a fresh process, with its CPU seconds and its MB."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure, args=(job, name, x.numpy(), options, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process that measures {job} ended with {process.exitcode}")
    row: Row = results.get()
    return row


def _measure(job: str, name: str, pixels: Any, options: argparse.Namespace, results: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    x = torch.from_numpy(pixels)
    model = make_model(name, x[:1], dict(options.checkpoint))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, start = _memory("VmRSS"), time.process_time()
    row = JOBS[job](model, x, options)
    row["seconds"] = (time.process_time() - start) * row.pop("factor", 1.0)
    row["MB"] = _memory("VmHWM") - before
    results.put(row)


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def compare(name: str, x: Tensor, options: argparse.Namespace) -> None:
    """Print time and memory of all jobs for one model, the phases of prepare, and time over images."""
    rows = {job: measured(job, name, x, options) for job in JOBS}
    loop, plain = rows["naive"]["seconds"], rows["forward"]["MB"]
    jobs = []
    for job, row in rows.items():
        shares = f"{row['seconds'] / loop:.3f}", f"{row['MB']:.0f}", f"{row['MB'] / plain:.2f}"
        jobs.append([job, f"{row['seconds']:.1f}", *shares])
    print(f"\n{name}\n")
    print(tabulate(jobs, ["", "CPU s", "of naive loop", "MB", "of one forward"], disable_numparse=True))

    prepared = rows["preparation"]
    phases = [[p, f"{prepared[p]:.1f}", f"{prepared[p] / prepared['seconds']:.2f}"] for p in PHASES.values()]
    print(f"\n{tabulate(phases, ['phase of prepare', 'CPU s', 'share'], disable_numparse=True)}")

    smaller = [count for count in (len(x) // 4, len(x) // 2) if count]
    times = {count: measured("analysis", name, x[:count], options)["seconds"] for count in smaller}
    times[len(x)] = rows["analysis"]["seconds"]
    sites = rows["analysis"]["sites"]
    growth = [[str(n), f"{s:.1f}", f"{1000 * s / n / sites:.0f}"] for n, s in times.items()]
    print(f"\n{tabulate(growth, ['images', 'analysis, CPU s', 'ms per image and site'])}", flush=True)


def main() -> None:
    """Print the comparison for each model."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--images", help="calibration images; default: scikit-image's photographs")
    add("--crops", type=int, default=8)
    add("--size", type=int, default=256)
    add("--activation-bits", type=activation_bits, default=MIXED, help="of prepare(); 0 is float")
    add("--memory", help="as of prepare(); default: its default")
    add("--target", type=float, default=0.1875, help="of prepare()")
    add("--naive", type=int, default=20, help="evaluations of the naive loop to time; 0: all of them")
    add("--threads", type=int, default=1)
    add_model_arguments(parser)
    options = parser.parse_args()
    photos = options.images or list(samples.photos().values())
    x = crops.cut(photos, size=options.size, count=options.crops)[0]
    limit = spelled(bytes_of(options.memory, x.device))
    print(processor())
    print(f"{len(x)} crops of {x.size(-1)} x {x.size(-2)}, memory {limit}, {options.threads} threads", end="")
    print(
        f", torch {torch.__version__}, target CR {options.target}, activation bits {options.activation_bits}"
    )
    for name in options.models:
        compare(name, x, options)


if __name__ == "__main__":
    main()
