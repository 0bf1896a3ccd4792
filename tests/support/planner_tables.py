"""Tables to plan from, and naive answers to compare planners with."""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import strategies as st

from fmpq_fx.passes.plan.planners import optimal
from fmpq_fx.passes.plan.tables import Table, monotone

Tables = tuple[Table, Table]  # zeta and cost
TARGETS = (0.30, 0.25, 0.20, 0.1875, 0.15, 0.125, 0.10)
BIT = 0.125  # bytes, the unit of nominal sizes

# Ties, zeros and values a little below zero, as measured and isotonic zeta has them, besides ordinary ones.
ZETA = st.one_of(
    st.sampled_from([0.0, 0.0, -1e-6, 1e-6, 0.01, 0.5]),
    st.floats(-6, 1).map(lambda exponent: 10**exponent),
)
PARAMS = st.sampled_from([1, 3, 17, 1000, 2359296])


@st.composite
def tables(draw: st.DrawFn, sites: int = 4) -> Tables:
    """Up to ``sites`` sites, each with its own widths; nominal costs or others that rise with the bits."""
    zeta: Table = {}
    cost: Table = {}
    for n in range(draw(st.integers(1, sites))):
        widths = sorted(draw(st.sets(st.integers(2, 10), min_size=1, max_size=4)))
        count = len(widths)
        falling = sorted(draw(st.lists(ZETA, min_size=count, max_size=count)), reverse=True)
        zeta[f"s{n}"] = dict(zip(widths, falling, strict=True))
        if draw(st.booleans()):
            params = draw(PARAMS)
            cost[f"s{n}"] = {b: params * b / 8 for b in widths}
        else:
            steps = draw(st.lists(st.integers(1, 5000), min_size=count, max_size=count))
            cost[f"s{n}"] = dict(zip(widths, map(float, itertools.accumulate(steps)), strict=True))
    return zeta, cost


def total(values: Mapping[str, Mapping[int, float]], bits: Mapping[str, int]) -> float:
    assert bits.keys() == values.keys()
    return math.fsum(values[site][b] for site, b in bits.items())


def every_plan(zeta: Table) -> Iterator[dict[str, int]]:
    for widths in itertools.product(*(zeta[site] for site in zeta)):
        yield dict(zip(zeta, widths, strict=True))


def every_size(zeta: Table, cost: Table) -> list[float]:
    return sorted({total(cost, bits) for bits in every_plan(zeta)})


def a_budget(data: st.DataObject, zeta: Table, cost: Table) -> float:
    """Draw the size of some plan, or one bit less or more, but not below the cheapest."""
    sizes = every_size(zeta, cost)
    return max(data.draw(st.sampled_from(sizes)) + data.draw(st.sampled_from([-BIT, 0, BIT])), sizes[0])


def naive_bits_at(zeta: Table, beta: float) -> dict[str, int]:
    return {site: min((b for b in v if v[b] < beta), default=max(v)) for site, v in zeta.items()}


def every_step(zeta: Table, cost: Table) -> list[float]:
    """Return the sizes that some beta leads to."""
    levels = {z for values in zeta.values() for z in values.values() if z > 0}
    return sorted({total(cost, naive_bits_at(zeta, beta)) for beta in (*levels, math.inf)})


def brute_force(zeta: Table, cost: Table, budget: float) -> float:
    return min(total(zeta, bits) for bits in every_plan(zeta) if total(cost, bits) <= budget)


def assert_optimal(zeta: Table, cost: Table, budget: float) -> None:
    bits = optimal(zeta, cost, budget).bits
    assert total(cost, bits) <= budget
    assert all(zeta[site][b] > zeta[site][now] for site, now in bits.items() for b in zeta[site] if b < now)
    spread = sum(max(v.values()) - min(v.values()) for v in zeta.values())
    best = brute_force(zeta, cost, budget)
    least = sum(min(v.values()) for v in zeta.values())
    assert total(zeta, bits) == pytest.approx(best, rel=0, abs=1e-11 * (best - least) + 1e-15 * spread)


def upgrades(zeta: Table, cost: Table, bits: dict[str, int], budget: float) -> list[float]:
    """How much zeta each single wider choice that fits the budget would save."""
    wider = [{**bits, site: b} for site in zeta for b in zeta[site] if b > bits[site]]
    return [total(zeta, bits) - total(zeta, w) for w in wider if total(cost, w) <= budget]


def realistic(seed: int, sites: int, noise: float) -> tuple[Table, Table, float]:
    """Log-linear zeta with measuring noise, made monotone; nominal costs; bytes of the float weights."""
    rng = np.random.default_rng(seed)
    params = np.exp(rng.uniform(np.log(3e3), np.log(2e6), sites)).astype(int).tolist()
    raw: Table = {}
    for n in range(sites):
        line = np.linspace(rng.uniform(-2, 1), rng.uniform(-6, -3), 9) + rng.normal(0, noise, 9)
        values = 10**line + rng.normal(0, 2e-5, 9)  # the second noise makes zeros and negative values
        raw[f"s{n}"] = dict(zip(range(2, 11), values.tolist(), strict=True))
    cost = {f"s{n}": {b: p * b / 8 for b in range(2, 11)} for n, p in enumerate(params)}
    return monotone(raw), cost, 4.0 * sum(params)


def small(params: tuple[int, ...] = (1, 3, 7)) -> Tables:
    """Three sites and 64 plans, few enough to try them all."""
    zeta = {f"s{n}": {2: 0.7 / (n + 1), 3: 0.2, 5: 0.2 - 1e-4 * n, 8: 1e-7} for n in range(3)}
    return zeta, {site: {b: p * b / 8 for b in zeta[site]} for site, p in zip(zeta, params, strict=True)}
