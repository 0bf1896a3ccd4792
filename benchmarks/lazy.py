"""Compare evaluations and time of lazily measured plans with the naive loop, and the plans with those of full tables.

The naive loop quantizes one site at a time and runs the whole model, for every site and bit-width. It, the full
table, and the lazy measurement for every planner and target run in one process per model, on the same images. The
last two columns are a plan's sites at other bits than planned on the full table, and how much more zeta that costs.

    python benchmarks/lazy.py --images ../data/bsds500/val --checkpoint mbt2018-mean=model.pth
"""

import argparse
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import compressai.models as zoo
import torch
from arguments import parser_of
from bench_models import add_measuring_arguments, bench_models, conditions
from sensitivity import naive_zeta
from tabulate import tabulate
from torch import fx, nn

from fmpq_fx import Plan, Sensitivity, analyze, samples
from fmpq_fx.images import crops
from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.passes.measure.lazy import plan_lazily
from fmpq_fx.passes.measure.sensitivity import Measurement, begin
from fmpq_fx.passes.plan.task import make_plan, make_task
from fmpq_fx.passes.trace import trace

OTHERS = {
    "bmshj2018-factorized, N=32": lambda: zoo.FactorizedPrior(32, 48),
    "bmshj2018-factorized-relu, N=32": lambda: zoo.FactorizedPriorReLU(32, 48),
    "cheng2020-attention, N=16": lambda: zoo.Cheng2020Attention(16),
    "elic2022-official, N=16": lambda: zoo.Elic2022Official(16, 32, groups=[4, 4, 8, 16]),
    "elic2022-chandelier, N=16": lambda: zoo.Elic2022Chandelier(16, 32, groups=[4, 4, 8, 16]),
    "cheng2020-anchor-checkerboard, N=24": lambda: zoo.Cheng2020AnchorCheckerboard(24),
}
"""The rest of the zoo, with random weights."""


def models(checkpoints: dict[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (description, model in evaluation mode) of every model of the zoo that is traced, one at a time."""
    yield from bench_models(checkpoints)
    for name, make in OTHERS.items():
        torch.manual_seed(0)
        yield f"{name}, random weights", make().eval()


def measure(name: str, args: argparse.Namespace) -> list[tuple[object, ...]]:
    """Return a row for each planner and target of the model ``name``, after one for its full table."""
    torch.set_num_threads(args.threads)
    model = dict(models(dict(args.checkpoint)))[name]
    batches = crops.cut(args.images or list(samples.photos().values()), size=args.size, count=args.crops)
    start = time.perf_counter()
    naive_zeta(model, batches[0], args.lmbda)  # first: what follows sets up malloc for its needs
    naive = time.perf_counter() - start
    start = time.perf_counter()
    table = analyze(model, calibration=batches, lmbda=args.lmbda)
    count = len(table.sites) * len(table.bits)
    rows: list[tuple[object, ...]] = [
        (name, "", "", count, (time.perf_counter() - start) / naive, "", ""),
    ]
    gm = trace(model)
    for planner in args.planners:
        for target in args.targets:
            start = time.perf_counter()
            plan = lazy_plan(gm, batches, table, target, planner, args.lmbda)
            ratio = (time.perf_counter() - start) / naive
            full = make_plan(table, target, planner=planner)
            differing = sum(plan.bits[site] != b for site, b in full.bits.items())
            excess = 100 * (_zeta(table, plan) - _zeta(table, full))
            evaluations = count - len(plan.sensitivity.missing)
            rows.append(("", planner, target, evaluations, ratio, differing, excess))
    return rows


def lazy_plan(
    gm: fx.GraphModule,
    batches: list[torch.Tensor],
    table: Sensitivity,
    target: float,
    planner: str,
    lmbda: float,
) -> Plan:
    """Return the plan that measures of ``gm`` only what it must; ``table`` has the sites and candidates."""
    task = make_task(table.sites, table.bits, target, planner=planner)
    return plan_lazily(task, begin(gm, make_bench(gm, batches), Measurement(lmbda)))


def _zeta(table: Sensitivity, plan: Plan) -> float:
    return math.fsum(table.zeta[site][b] for site, b in plan.bits.items() if b is not None)


def main() -> None:
    """Print the comparison for the models."""
    parser = parser_of(__doc__)
    add_measuring_arguments(parser)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.25, 0.1875, 0.125])
    parser.add_argument("--planners", nargs="+", default=["adaptive", "optimal", "uniform"])
    args = parser.parse_args()
    print(conditions(args))
    rows = []
    for name, _ in models(dict(args.checkpoint)):
        if args.only in name:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows += process.submit(measure, name, args).result()
    headers = [
        "model",
        "planner",
        "target CR",
        "evaluations",
        "time / naive loop",
        "sites differing",
        "zeta (%)",
    ]
    print(tabulate(rows, headers, floatfmt=("", "", "", "", ".3f", "", "+.4f")))


if __name__ == "__main__":
    main()
