"""Plans made by hand, and what to compare of the graphs that are rewritten by them."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.passes.annotation import NodeNote, note_of
from fmpq_fx.passes.plan.tables import Plan, Sensitivity
from fmpq_fx.passes.sites import find_sites, float_remainder


def plan_for(gm: fx.GraphModule, activation_bits: int | None = None, **bits: int | None) -> Plan:
    """Return a plan made by hand: 2, 3, 4 … bits in turn, but for those given, "g_a__0" meaning g_a.0."""
    sites = find_sites(gm)
    given = {name.replace("__", "."): b for name, b in bits.items()}
    chosen = {site.name: given.get(site.name, 2 + i % 6) for i, site in enumerate(sites)}
    zero = {site.name: {4: 0.0} for site in sites}
    table = Sensitivity(sites, 0.01, 1.0, 1.0, zero, zero, float_remainder(gm, sites), "none")
    return Plan(sites, chosen, dict.fromkeys(chosen, activation_bits), 0.25, "uniform", table)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = model(x)
    return [output["x_hat"], *output["likelihoods"].values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def notes(gm: fx.GraphModule) -> list[tuple[Any, NodeNote]]:
    """Return what is noted on each node that runs sites, with what it runs."""
    return [(n.target, note_of(n)) for n in gm.graph.nodes if note_of(n).sites]
