"""RD loss above float32 after each planner, before any fine-tuning, on images that were not calibrated on.

python benchmarks/rd_loss.py --calibration ../data/bsds500/val --images ../data/kodak
"""

from arguments import add_model, parser_of
from tabulate import tabulate

from fmpq_fx import analyze, plan_of, prepare, samples
from fmpq_fx.images import crops
from fmpq_fx.models.zoo import load_model
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.rewrite import activations_float
from fmpq_fx.passes.trace import trace
from fmpq_fx.report.table import short_bits


def main() -> None:
    """Print a row per size and planner."""
    parser = parser_of(__doc__)
    add_model(parser)
    parser.add_argument("--calibration", help="image folder; default: scikit-image's photographs")
    parser.add_argument("--images", help="image folder; default: scikit-image's other photographs")
    parser.add_argument("--crops", type=int, default=24, help="256 x 256 crops of --images")
    parser.add_argument("--lmbda", type=float, default=0.013)
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[8, 6, 5, 4], help="average bits of the weights"
    )
    args = parser.parse_args()
    model = load_model(args.model, checkpoint=args.checkpoint)
    test = crops.cut(args.images or list(samples.held_out_photos().values()), count=args.crops)
    table = analyze(model, calibration=args.calibration, lmbda=args.lmbda)
    float_model = trace(model)
    bench = make_bench(float_model, test)
    float_rd = mean_rd(float_model, bench, args.lmbda)
    print(f"{args.model}, lambda {args.lmbda}; calibrated on {args.calibration or 'scikit-image'};")
    print(f"RD loss of float32 on {crops.describe(test)}: {float_rd:.4f}")
    rows = []
    for bits in args.bits:
        for planner in ("uniform", "adaptive", "optimal"):
            gm = prepare(model, bits / 32, calibration=args.calibration, sensitivity=table, planner=planner)
            mixed = mean_rd(gm, bench, args.lmbda)
            with activations_float(gm):
                a32 = mean_rd(gm, bench, args.lmbda)
            above = [f"{100 * (rd / float_rd - 1):+.2f} %" for rd in (a32, mixed)]
            rows.append([f"{bits:g}", planner, short_bits(plan_of(gm)), *above])
    headers = ["bits asked", "planner", "bits", "A32: RD loss above float", "inputs rounded too"]
    print(
        tabulate(rows, headers, disable_numparse=True, colalign=("right", "left", "right", "right", "right"))
    )


if __name__ == "__main__":
    main()
