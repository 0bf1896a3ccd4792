"""Measure the gain of exchanging bits between sites over a plan by the sum of zeta.

Zeta is measured with all other sites float, and a plan uses its sum. Here the optimal plan is refined: around it,
every site is measured with up to two bits more and less while all others keep the plan's, the knapsack is solved for
these changes, and its plan is taken if its RD loss really is lower, until none is.

    python benchmarks/exchanges.py --calibration ../data/bsds500/val --images ../data/kodak
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from arguments import parser_of
from tabulate import tabulate
from torch import fx, nn

from fmpq_fx import Plan, analyze, samples
from fmpq_fx.images import crops
from fmpq_fx.passes.clip.scales import choose_scales
from fmpq_fx.passes.measure.bench import Bench, make_bench, mean_rd
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.passes.plan.knapsack import total_at
from fmpq_fx.passes.plan.planners import optimal
from fmpq_fx.passes.plan.task import make_plan
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import QuantizedLayer, quantize_layer

MOST_ROUNDS, REACH = 5, 2  # rounds, bits


class Exchanges:
    """Refines plans of one model, weights only.

    Args:
        model: a float model.
        bench: what is measured on.
        lmbda: of the RD loss.
    """

    def __init__(self, model: nn.Module, bench: Bench, lmbda: float):
        self.model, self.bench, self.lmbda = model, bench, lmbda
        self.float_rd = mean_rd(trace(model), bench, lmbda)

    def graph(self, plan: Plan) -> fx.GraphModule:
        """Return the graph of ``plan``, with min-max scales."""
        return quantize(trace(self.model), plan).eval()

    def rise(self, plan: Plan) -> float:
        """Return by how much the RD loss of ``plan`` is above float's, as a part of it."""
        return mean_rd(self.graph(plan), self.bench, self.lmbda) / self.float_rd - 1

    def around(self, plan: Plan, widths: tuple[int, ...]) -> dict[str, dict[int, float]]:
        """Return how each near width of each site changes the RD loss of ``plan``, as a fraction of float's RD loss."""
        meter = ChangeMeter(self.graph(plan), self.bench)
        base = meter.measure_base().rd(self.lmbda)
        near = {
            (site, b): {site: partial(_at_bits, bits=b)}
            for site, now in plan.bits.items()
            for b in widths
            if now is not None and 0 < abs(b - now) <= REACH
        }
        changes: dict[str, dict[int, float]] = {site: {b or 0: 0.0} for site, b in plan.bits.items()}
        for (site, b), sums in meter.measure(near).items():
            changes[site][b] = (sums.rd(self.lmbda) - base) / self.float_rd
        return changes

    def refined(self, plan: Plan, cost: Mapping[str, Mapping[int, float]], budget: float) -> Plan:
        """Return ``plan`` after exchanges that lower the RD loss, within ``budget`` bytes."""
        best = self.rise(plan)
        for _ in range(MOST_ROUNDS):
            changes = self.around(plan, tuple(sorted({b for widths in cost.values() for b in widths})))
            near = {site: {b: cost[site][b] for b in values} for site, values in changes.items()}
            tried = replace(plan, bits={**optimal(changes, near, budget).bits})
            rise = self.rise(tried)
            if rise >= best:
                break
            plan, best = tried, rise
        return plan


def _at_bits(layer: nn.Module, bits: int) -> nn.Module:
    assert isinstance(layer, QuantizedLayer)
    return quantize_layer(layer.layer, bits=bits)


def main() -> None:
    """Print a row per size."""
    parser = parser_of(__doc__)
    parser.add_argument("--calibration", help="image folder; default: scikit-image's photographs")
    parser.add_argument("--images", help="image folder; default: scikit-image's other photographs")
    parser.add_argument("--crops", type=int, default=24, help="256 x 256 crops of --images")
    parser.add_argument("--lmbda", type=float, default=0.013)
    parser.add_argument("--target-cr", type=float, nargs="+", default=[0.1875, 0.15625, 0.125])
    args = parser.parse_args()
    model, calibration = samples.model(args.lmbda).eval(), crops.batches(args.calibration)
    test = crops.cut(args.images or list(samples.held_out_photos().values()), count=args.crops)
    table = analyze(model, calibration=calibration, lmbda=args.lmbda)
    exchanges = Exchanges(model, make_bench(trace(model), calibration), args.lmbda)
    held_out = make_bench(trace(model), test)
    float_rd = mean_rd(trace(model), held_out, args.lmbda)
    cost = {site.name: {b: site.bytes_at(b) for b in table.bits} for site in table.sites}
    rows = []
    for cr in args.target_cr:
        plan = make_plan(table, cr, planner="optimal", activation_bits=None)
        refined = exchanges.refined(plan, cost, cr * sum(site.bytes_at(None) for site in table.sites))
        row = [f"{cr:g}", f"{100 * total_at(table.zeta, {s: b or 0 for s, b in plan.bits.items()}):+.2f} %"]
        row += [f"{100 * exchanges.rise(each):+.2f} %" for each in (plan, refined)]
        for each in (plan, refined):
            gm = exchanges.graph(each)
            choose_scales(gm, exchanges.bench)
            row.append(f"{100 * (mean_rd(gm, held_out, args.lmbda) / float_rd - 1):+.2f} %")
        rows.append([*row, str(sum(plan.bits[s] != b for s, b in refined.bits.items()))])
    print(f"sample model, lambda {args.lmbda}; calibrated on {crops.describe(calibration)}; held out:")
    print(f"{crops.describe(test)}. RD loss above float, weights only, activations float:\n")
    headers = ["CR", "sum of zeta", "optimal", "refined", "held out: optimal", "refined", "sites changed"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["right"] * len(headers)))


if __name__ == "__main__":
    main()
