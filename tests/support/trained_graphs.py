"""Rewritten graphs as training leaves them, and a user's model that cannot code."""

from typing import Any

import torch
from torch import fx, nn

from fmpq_fx import Plan, Sensitivity
from fmpq_fx.passes.plan.inputs import InputGrid
from fmpq_fx.passes.rewrite import quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from support.traced_models import Codec


def trained(
    model: nn.Module, activation_bits: int | None = 8, *widths: int | None, **fixed: int | None
) -> fx.GraphModule:
    """Return a rewritten graph whose weights, steps and zero points are not those of its plan any more."""
    gm = trace(model)
    sites = find_sites(gm)
    names = [site.name for site in sites]
    cycle = widths or (3, 4, 5, 8)
    bits = {name: fixed.get(name.replace(".", ""), cycle[n % len(cycle)]) for n, name in enumerate(names)}
    zeta = {name: {4: 0.1, 8: 0.01} for name in names}
    sensitivity = Sensitivity(sites, 0.01, 0.5, 0.5, zeta, zeta, {"bias": 8}, "no images at all")
    inputs = {name: InputGrid(-1.5, 2.25, spread=_spread(gm, name)) for name in names if activation_bits}
    clips = {names[0]: 0.9}
    of_inputs: dict[str, int | None] = dict.fromkeys(names, activation_bits)
    gm = quantize(gm, Plan(sites, bits, of_inputs, 0.5, "", sensitivity, clips=clips, inputs=inputs))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in gm.parameters():
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.01)
    return gm.eval()


def _spread(gm: fx.GraphModule, site: str) -> tuple[int, ...]:
    """Return steps per channel for convolutions of one group."""
    layer: Any = gm.get_submodule(site)
    channels = layer.in_channels if getattr(layer, "groups", 0) == 1 else 0
    return tuple(3 * channel % 17 for channel in range(channels))


class Own(Codec):
    """A user's model: it cannot code, has a layer under two names, and tensors of several types."""

    def __init__(self) -> None:
        super().__init__(lambda model, x: model.twin(x) + model.conv(x + model.mean.to(x.dtype)))
        self.twin = self.conv
        self.register_buffer("mean", torch.tensor(1 / 3))
        self.register_buffer("seen", torch.tensor([2**40, -1]))
        self.register_buffer("used", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0, 3))
