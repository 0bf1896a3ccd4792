r"""Fine-tune with the coded size of the weights in the loss, and compare model files and RD losses.

    python benchmarks/size_weight.py --calibration bsds500/val --train bsds500/train --images kodak \
        --row 8 0 --row 12 0 --row 11 3

A row is how many times smaller the coded weights are planned to be, and the size_weight that they are fine-tuned with.
The RD loss is that of crops that were not trained on, from the likelihoods.
"""

from pathlib import Path

import torch
from arguments import parser_of
from tabulate import tabulate

from fmpq_fx import Sensitivity, analyze, finetune, plan_of, prepare, samples
from fmpq_fx.images import crops
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.measure.coded_sizes import coded_cr
from fmpq_fx.passes.trace import trace
from fmpq_fx.report.table import short_bits


def main() -> None:
    """Print a row per plan and size_weight, each as soon as it is there, and all of them at the end."""
    parser = parser_of(__doc__)
    parser.add_argument("--calibration", help="image folder; default: scikit-image's photographs")
    parser.add_argument("--train", required=True, help="image folder to fine-tune on")
    parser.add_argument("--images", required=True, help="image folder to test on")
    parser.add_argument("--crops", type=int, default=24, help="256 x 256 crops of --images")
    parser.add_argument("--lmbda", type=float, default=0.013)
    parser.add_argument(
        "--sensitivity", type=Path, help="table that fmpq_fx.analyze made; default: measure it"
    )
    parser.add_argument(
        "--row", type=float, nargs=2, action="append", metavar=("FACTOR", "WEIGHT"), required=True
    )
    parser.add_argument("--quantizer-lr", type=float, default=3e-3, help="with size_weight; else the default")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, calibration = samples.model(args.lmbda), crops.batches(args.calibration)
    test = crops.cut(args.images, count=args.crops)
    table = Sensitivity.load(args.sensitivity) if args.sensitivity else None
    table = table or analyze(model, calibration=calibration, lmbda=args.lmbda)
    bench = make_bench(trace(model), test)
    float_rd = mean_rd(trace(model), bench, args.lmbda)
    rows = []
    for target, weight in args.row:
        gm = prepare(
            model,
            target,
            calibration=calibration,
            lmbda=args.lmbda,
            activation_bits=None,
            planner="optimal",
            size="coded",
            sensitivity=table,
        )
        row = [f"{target:g}x", short_bits(plan_of(gm)), f"{weight:g}"]
        row += [f"{coded_cr(gm):.4f}", f"{100 * (mean_rd(gm, bench, args.lmbda) / float_rd - 1):+.2f} %"]
        rates = {"quantizer_lr": args.quantizer_lr} if weight else {}
        finetune(gm, args.train, steps=args.steps, size_weight=weight, **rates)
        cr, rd = coded_cr(gm), mean_rd(gm, bench, args.lmbda)
        rows.append([*row, f"{cr:.4f}", f"{1 / cr:.2f}x", f"{100 * (rd / float_rd - 1):+.2f} %"])
        print(*rows[-1], flush=True)
    print(
        f"\nsample model, lambda {args.lmbda:g}, activations float, {args.steps} steps; RD loss above float32 on"
    )
    print(f"{crops.describe(test)} of {args.images}: {float_rd:.4f}\n")
    headers = [
        "plan",
        "bits",
        "size_weight",
        "coded CR",
        "RD loss",
        "fine-tuned: coded CR",
        "smaller",
        "RD loss",
    ]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["right"] * len(headers)))


if __name__ == "__main__":
    main()
