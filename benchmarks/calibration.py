"""How far bit-widths depend on the calibration images: on which they are, and on how many.

For every number of images and every seed: sensitivity on random crops, a plan, how far its bits are from those
of the plan made from most images (the mean over its seeds), and the RD loss on other images (weights only, min-max
scales, no fine-tuning, so that nothing but the bits differs). Every result is kept as soon as it is there.

    python benchmarks/calibration.py --calibration bsds500/val --images kodak
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from arguments import add_model, parser_of
from figures import save
from tabulate import tabulate

from fmpq_fx import analyze, rewrite, samples
from fmpq_fx.images import crops
from fmpq_fx.images.reading import fingerprint, sources
from fmpq_fx.models.zoo import load_model
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.plan.task import make_plan
from fmpq_fx.passes.trace import trace
from fmpq_fx.progress import reported
from fmpq_fx.storage.files import write_text
from fmpq_fx.storage.fingerprint import digest


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_model(parser)
    add = parser.add_argument
    add("--lmbda", type=float, default=0.013)
    add("--calibration", required=True, help="image folder to measure sensitivity on")
    add("--images", required=True, help="image folder to measure the RD loss on")
    add("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="calibration images")
    add("--seeds", type=int, default=3)
    add("--target-cr", type=float, default=0.1875)
    add("--planner", default="optimal", help="adaptive ends at another size each time, which would confound")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results and picture")
    return parser.parse_args()


def main() -> None:
    """Measure missing points, print a row per number of images, and draw them."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    sample = args.model == "sample"
    model = samples.model(args.lmbda) if sample else load_model(args.model, checkpoint=args.checkpoint)
    where = f"{fingerprint(sources(args.calibration))}; {fingerprint(sources(args.images))}"
    what = f"{digest(model.state_dict())[:12]}; {where}; {args.planner}, CR {args.target_cr:g}, lambda {args.lmbda:g}"
    path = args.out / f"calibration-{args.model}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    test = crops.cut(args.images, count=24)
    float_model = trace(model)
    bench = make_bench(float_model, test)
    float_rd = mean_rd(float_model, bench, args.lmbda)
    jobs = [(count, seed) for count in sorted(args.counts) for seed in range(args.seeds)]
    keys = [f"{what}; {count} images, seed {seed}" for count, seed in jobs]
    for (count, seed), key in zip(reported(jobs, "calibrations", "plan", leave=True), keys, strict=True):
        if key in done:
            continue
        batches = crops.cut(args.calibration, count=count, seed=seed)
        table = analyze(model, calibration=batches, lmbda=args.lmbda)
        plan = make_plan(table, args.target_cr, planner=args.planner, activation_bits=None)
        above = mean_rd(rewrite(model, plan), bench, args.lmbda) / float_rd - 1
        done[key] = {"count": count, "bits": plan.bits, "above": above}
        write_text(path, json.dumps(done, indent=1) + "\n")
    _report([done[key] for key in keys], args)


def _report(results: list[dict[str, object]], args: argparse.Namespace) -> None:
    bits = np.array([list(r["bits"].values()) for r in results])  # type: ignore[attr-defined]
    counts, above = np.array([r["count"] for r in results]), np.array([r["above"] for r in results])
    reference = bits[counts == counts.max()].mean(0)
    rows, costs = [], []
    for count in sorted(set(counts)):
        mine = counts == count
        spread = bits[mine].std(0).mean()
        distance = np.abs(bits[mine] - reference).mean()
        costs.append(100 * above[mine])
        low, mean, high = costs[-1].min(), costs[-1].mean(), costs[-1].max()
        rows.append(
            [count, f"{spread:.2f}", f"{distance:.2f}", f"{mean:+.2f} %", f"{low:+.2f} … {high:+.2f} %"]
        )
    headers = [
        "images",
        "spread over seeds (bits)",
        "from most images (bits)",
        "RD loss above float",
        "range",
    ]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["right"] * 5))
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for count, cost in zip(sorted(set(counts)), costs, strict=True):
        axes.semilogx([count] * len(cost), cost, "o", color="tab:blue", base=2)
    axes.set_xlabel("calibration images")
    axes.set_ylabel("RD loss above float (%)")
    axes.grid(alpha=0.3)
    path = args.out / f"calibration-{args.model}.png"
    save(figure, path)
    print(f"\nplans: {args.planner}, CR {args.target_cr:g}, weights only, no fine-tuning. Picture: {path}")


if __name__ == "__main__":
    main()
