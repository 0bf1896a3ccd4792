"""Time of the full sensitivity table: the naive loop against ``analyze``, and whether the values are the same.

The naive loop quantizes one site at a time and runs the whole model, for every site and bit-width. Both run in
one process per model, on the same images, one after the other.

    python benchmarks/sensitivity.py --images ../data/bsds500/val --checkpoint mbt2018-mean=model.pth --out out/tables
"""

import argparse
import copy
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from arguments import parser_of
from bench_models import add_measuring_arguments, bench_models, conditions
from tabulate import tabulate
from torch import Tensor, nn

from fmpq_fx import analyze, samples
from fmpq_fx.images import crops
from fmpq_fx.passes.measure.sensitivity import CANDIDATE_BITS
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.swap import substituted
from fmpq_fx.passes.trace import trace
from fmpq_fx.progress import reported
from fmpq_fx.quant import quantize_layer
from fmpq_fx.rd import rd_sums


def naive_zeta(model: nn.Module, x: Tensor, lmbda: float) -> dict[str, dict[int, float]]:
    """Return zeta of every site at the default bit-widths by full forward passes of ``model``."""
    sites = find_sites(trace(model))
    model = copy.deepcopy(model)
    zeta: dict[str, dict[int, float]] = {site.name: {} for site in sites}
    with torch.no_grad():
        float_rd = rd_sums(model(x), x).rd(lmbda)
        for site in reported(sites, "naive", "site"):
            for bits in CANDIDATE_BITS:
                with substituted(model, {site.name: quantize_layer(model.get_submodule(site.name), bits)}):
                    rd = rd_sums(model(x), x).rd(lmbda)
                zeta[site.name][bits] = (rd - float_rd) / float_rd
    return zeta


def measure(name: str, args: argparse.Namespace) -> tuple[object, ...]:
    """Return a row: the model, evaluations, both times in s, their ratio, the largest difference of zeta.

    The naive loop comes first: ``analyze`` sets up malloc for its needs, which would speed up a loop after it.
    """
    torch.set_num_threads(args.threads)
    model = dict(bench_models(dict(args.checkpoint)))[name]
    batches = crops.cut(args.images or list(samples.photos().values()), size=args.size, count=args.crops)
    start = time.perf_counter()
    naive = naive_zeta(model, batches[0], args.lmbda)
    middle = time.perf_counter()
    table = analyze(model, calibration=batches, lmbda=args.lmbda)
    end = time.perf_counter()
    difference = max(abs(naive[site][b] - z) for site, values in table.raw.items() for b, z in values.items())
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        table.save(args.out / f"{name.partition(',')[0]}.json")
    ratio = (end - middle) / (middle - start)
    return name, len(table.sites) * len(table.bits), middle - start, end - middle, ratio, difference


def main() -> None:
    """Print the comparison for the four models."""
    parser = parser_of(__doc__)
    add_measuring_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder to save the tables in, for benchmarks/search.py")
    args = parser.parse_args()
    print(conditions(args))
    rows = []
    for name, _ in bench_models(dict(args.checkpoint)):
        if args.only in name:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows.append(process.submit(measure, name, args).result())
    headers = ["model", "evaluations", "naive loop (s)", "analyze (s)", "ratio", "largest difference in zeta"]
    print(tabulate(rows, headers, floatfmt=("", "", ".1f", ".1f", ".3f", ".1e")))


if __name__ == "__main__":
    main()
