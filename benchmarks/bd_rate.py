r"""BD-rate and BD-PSNR of quantized models against float32, on real bitstreams, before and after fine-tuning.

For every lambda: the float model, the float model fine-tuned for the same steps, and every planner at every
size, weights only (A32) and with 8-bit activations (A8). Every result is kept as soon as it is there: the same
command goes on where it was stopped, and several processes may share the work, each with lambdas of its own.

    python benchmarks/bd_rate.py --calibration bsds500/val --train bsds500/train --images kodak
    python benchmarks/bd_rate.py --model mbt2018-mean --qualities 1 2 3 4 5 6 --metric ms-ssim \
        --calibration bsds500/val --train bsds500/train --images kodak
"""

from dataclasses import replace

from arguments import add_activation_bits, parser_of
from rd_bench import add_arguments, benches
from rd_points import Variant
from rd_table import plot_curves, print_losses, print_published, print_table

from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.plan.widths import MIXED
from fmpq_fx.pipeline import SIZES
from fmpq_fx.progress import reported


def main() -> None:
    """Measure missing points, and print and draw all points."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--planners", nargs="+", default=["adaptive", "uniform", "optimal"])
    add("--target-cr", type=float, nargs="+", default=[0.25, 0.1875, 0.15625, 0.125])
    add_activation_bits(parser, [None, 8, MIXED])
    add("--activation-budget", type=float, default=Variant.activation_budget, help="of mixed activation bits")
    add("--size", choices=SIZES, default="nominal", help="what the target CR counts")
    add("--report", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args()
    given = benches(args)
    if not args.report:
        with freed_memory_kept():
            for bench in given:
                bench.measure([Variant(), Variant(steps=args.steps)])
            jobs = [(p, cr, bench) for p in args.planners for cr in args.target_cr for bench in given]
            for planner, cr, bench in reported(jobs, "plans", "plan", leave=True):
                for bits in args.activation_bits:
                    budget = args.activation_budget if bits == MIXED else Variant.activation_budget
                    plan = Variant(planner, cr, bits, size=args.size, activation_budget=budget)
                    bench.measure([plan, replace(plan, steps=args.steps)])
    # What is there of these steps, where there is something to compare with.
    needed = {Variant(), Variant(steps=args.steps)}
    everything = [
        {v: p for v, p in bench.results.points.items() if v.steps in (0, args.steps)}
        for bench in given
        if needed <= bench.results.points.keys()
    ]
    if not everything:
        raise SystemExit(f"no lambda has the float model, as it is and after {args.steps} steps, yet")
    if len(everything) >= 4:
        print_table(everything, args.steps)
        if args.metric == "mse":
            print_published(args.model)
        plot_curves(everything, args.steps, args.out / f"bd_rate-{given[0].series}.png")
    print_losses(everything, args.steps)


if __name__ == "__main__":
    main()
