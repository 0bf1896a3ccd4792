"""Sensitivity tables that are made up."""

from collections.abc import Mapping

from fmpq_fx.passes.plan.tables import Sensitivity, Site

PARAMS = {"g_a.0": 9600, "g_a.1": 16384, "g_a.2": 409600, "h_a.0": 36864, "h_s.4": 102400, "g_s.6": 9603}


def sensitivity(params: Mapping[str, int] | None = None, widths: range = range(2, 11)) -> Sensitivity:
    """Zeta falls by a factor of 4 per bit, from another value for each site."""
    params = PARAMS if params is None else params
    sites = tuple(Site(name, name.replace(".", "_"), "Conv2d", count) for name, count in params.items())
    rate = {site.name: {b: (n + 1) * 4.0**-b for b in widths} for n, site in enumerate(sites)}
    nothing = {site: dict.fromkeys(widths, 0.0) for site in rate}
    return Sensitivity(sites, 0.01, 0.5, 0.5, rate, nothing, {}, "nothing")
