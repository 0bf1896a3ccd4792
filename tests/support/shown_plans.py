"""A small model and a plan of it, to be shown."""

import functools

import torch
from compressai.models import ScaleHyperprior
from torch import fx, nn

from fmpq_fx.passes.measure.bench import make_bench
from fmpq_fx.passes.measure.sensitivity import Measurement, measure_sensitivity
from fmpq_fx.passes.plan.tables import Measured, Plan
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.trace import trace

WIDTHS = [2, 5, 8]


@functools.cache
def model() -> ScaleHyperprior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ScaleHyperprior(8, 12).eval()


@functools.cache
def plan() -> Plan:
    """Give the sites 2, 5, 8, 2, 5, ... bits."""
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gm = trace(model())
    table = measure_sensitivity(
        gm, make_bench(gm, [x]), Measurement(bits=tuple(WIDTHS), images="1 crop of 64 x 64")
    )
    return Plan(
        sites=table.sites,
        bits={site.name: WIDTHS[i % 3] for i, site in enumerate(table.sites)},
        activation_bits={site.name: 8 for site in table.sites},
        target_cr=0.1875,
        planner="adaptive",
        sensitivity=table,
        beta=0.0123,
        history=((0.01, 0.15), (0.02, 0.14), (0.0123, 0.145)),
        measured=Measured(table.float_rd, 1.05 * table.float_rd, 1.1 * table.float_rd),
    )


def quantized(model: nn.Module, plan: Plan) -> fx.GraphModule:
    return quantize(trace(model), plan)
