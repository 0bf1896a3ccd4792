"""Turn a sensitivity and a target size into a plan: check the request, then let a planner decide."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fmpq_fx.passes.plan.planners import PLANNERS, Assignment
from fmpq_fx.passes.plan.tables import FLOAT_BITS, Plan, Sensitivity, Site, Table
from fmpq_fx.passes.plan.widths import MIXED, ActivationBits, Widths, activation_widths, by_site

WINDOW = 0.01
"""How far below the target CR the adaptive search may end (Hossain, Duan, Zhu, arXiv 2506.01221)."""


@dataclass(frozen=True)
class Task:
    """The request to a planner, without zeta."""

    sites: tuple[Site, ...]  # in the order of the graph
    given: dict[str, int | None]  # the bits of sites that the planner must not choose for
    cost: Table  # bytes of each site at each width that it may get; a given site has one
    budget: float  # bytes that all sites may take together
    target: float  # the budget as a fraction of float32
    planner: str
    activation_bits: dict[str, int | None]  # bits of each site's input; None stays float
    mixed: tuple[str, ...]  # the sites whose inputs have 8 bits until calibration chooses theirs
    coded: Table | None  # bytes per site and width as the model file codes them; None: size is nominal

    @property
    def float_bytes(self) -> float:
        """Bytes of all sites' weights in float32."""
        return sum(site.bytes_at(None) for site in self.sites)

    @property
    def window(self) -> float:
        """How many bytes below the budget the adaptive search may end."""
        return WINDOW * self.float_bytes

    def choices(self, zeta: Table) -> Table:
        """Return zeta at the widths that the planner may choose from."""
        # Where there is no choice, zeta does not matter and may not have been measured.
        idle = self.cost if self.planner == "uniform" else self.given
        return {
            site: dict.fromkeys(widths, 0.0) if site in idle else {b: zeta[site][b] for b in widths}
            for site, widths in self.cost.items()
        }

    def assign(self, zeta: Table) -> Assignment:
        """Let the planner decide by ``zeta``, which has at least the widths that it may choose from."""
        options = {"window": self.window} if self.planner == "adaptive" else {}
        return PLANNERS[self.planner](self.choices(zeta), self.cost, self.budget, **options)

    def plan(self, sensitivity: Sensitivity, sketch: Table | None = None) -> Plan:
        """Return the plan for the monotone zeta of ``sensitivity``; the ``sketch`` helps where it was not measured."""
        found = self.assign(sensitivity.expected(0, sketch))
        return Plan(
            sites=self.sites,
            bits={name: self.given.get(name, width) for name, width in found.bits.items()},
            activation_bits=self.activation_bits,
            target_cr=self.target,
            planner=self.planner,
            sensitivity=sensitivity,
            beta=found.beta,
            history=tuple((beta, size / self.float_bytes) for beta, size in found.history),
            remarks=found.remarks,
            coded=self.coded,
        )


def make_task(
    sites: tuple[Site, ...],
    measurable: tuple[int, ...],
    target_cr: float,
    *,
    planner: str = "adaptive",
    bits: Iterable[int] | None = None,
    fixed: Widths | None = None,
    activation_bits: ActivationBits = MIXED,
    coded: Table | None = None,
) -> Task:
    """Check the request to a planner: give every site bits, so that all take at most ``target_cr``.

    Args:
        sites: the sites of the model.
        measurable: the widths for which zeta is known or can be measured.
        target_cr: bytes / float32 bytes over all sites, the fixed ones included. A number above 1 is read as
            the factor: 4 means 0.25.
        planner: "adaptive" (FMPQ's search for beta, to within 0.01 below the target), "optimal" (least sum of
            zeta) or "uniform" (one width for all).
        bits: candidate widths, all of them ``measurable``; None is all that are.
        fixed: widths by site name or glob, which the planner must keep: 2 to 16 bits, measurable or not, or None
            for float32. A name wins over a glob, a later glob over an earlier one.
        activation_bits: see :func:`activation_widths`. They take no model size.
        coded: bytes of each site at each of its widths, to plan with instead of the nominal ones.

    Raises:
        ValueError: an argument is out of its range. For a target that no plan reaches the message names the
            reachable interval.
        TypeError: ``target_cr`` is not a number, ``bits`` not iterable or ``fixed`` not a mapping.
    """
    target = _fraction(target_cr)
    activations, mixed = activation_widths(activation_bits, sites)
    if planner not in PLANNERS:
        raise ValueError(f"there is no planner {planner!r}; pass one of {', '.join(map(repr, PLANNERS))}")
    candidates = _candidates(bits, measurable)
    given = fixed_widths(fixed, sites)

    cost = _cost(sites, candidates, given, coded)
    float_bytes = sum(site.bytes_at(None) for site in sites)
    budget, target = _budget(target, float_bytes)
    low, high = (sum(end(values.values()) for values in cost.values()) for end in (min, max))
    if not low <= budget <= high:
        among = f"candidates of {', '.join(map(str, candidates))} bits"
        among += f" and {len(given)} of {len(cost)} sites fixed" if given else ""
        raise ValueError(_unreachable(target_cr, target, low / float_bytes, high / float_bytes, among))
    return Task(sites, given, cost, budget, target, planner, activations, mixed, coded)


def make_plan(sensitivity: Sensitivity, target_cr: float, **options: Any) -> Plan:
    """Return the plan for ``target_cr`` by ``sensitivity``.

    The hyper path at 4 bits, the first layer in float32, and the other sites so that all are 4x smaller::

        plan = make_plan(sensitivity, 0.25, fixed={"h_*": 4, "g_a.0": None})

    The options and the errors are those of :func:`make_task`.
    """
    return make_task(sensitivity.sites, sensitivity.bits, target_cr, **options).plan(sensitivity)


def fixed_widths(fixed: Widths | None, sites: Iterable[Site]) -> dict[str, int | None]:
    """Return the bits of the sites whose bits are given (see :func:`by_site`)."""
    return by_site(
        {} if fixed is None else fixed, (s.name for s in sites), "fixed", "to keep the site float32"
    )


def _cost(
    sites: tuple[Site, ...],
    candidates: tuple[int, ...],
    given: Mapping[str, int | None],
    coded: Table | None,
) -> Table:
    """Return the bytes of each site at each width that the planner may choose, in the order of the sites."""
    cost: Table = {}
    for site in sites:
        width = given.get(site.name)
        widths = ((FLOAT_BITS if width is None else width),) if site.name in given else candidates
        sizes = {} if coded is None else coded[site.name]  # a site that stays float is not coded
        cost[site.name] = {b: sizes.get(b, site.bytes_at(b)) for b in widths}
    return cost


def _fraction(target_cr: object) -> float:
    """Return a target as a fraction of the float32 bytes; a target above 1 is the factor.

    Raises:
        TypeError: ``target_cr`` is not a number.
        ValueError: ``target_cr`` is not positive and finite.
    """
    example = "pass a fraction of the float32 size, such as 0.25, or a factor, such as 4"
    if isinstance(target_cr, bool) or not isinstance(target_cr, Real):
        raise TypeError(f"target_cr is {target_cr!r} of type {type(target_cr).__name__}; {example}")
    target = float(target_cr)
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"target_cr is {target_cr}; {example}")
    return 1 / target if target > 1 else target


def _candidates(bits: Iterable[int] | None, measured: tuple[int, ...]) -> tuple[int, ...]:
    """Return the candidate widths, ascending.

    Raises:
        TypeError: ``bits`` is not iterable.
        ValueError: there are none, or some were not measured.
    """
    if bits is None:
        return measured
    if not isinstance(bits, Iterable):
        raise TypeError(f"bits is {bits!r}; pass several widths, such as range(2, 9), or [{bits!r}] for one")
    chosen = list(bits)
    if not chosen:
        raise ValueError(f"bits has no width in it; pass some of {list(measured)}")
    missing = [b for b in chosen if b not in measured]
    if missing:
        raise ValueError(
            f"bits has {missing}, and only {list(measured)} were measured; pass some of these, or measure "
            "again with analyze(model, bits=...)"
        )
    return tuple(sorted({int(b) for b in chosen}))


def _budget(target: float, float_bytes: float) -> tuple[float, float]:
    """Return the bytes that a CR allows, and the CR, both without rounding errors.

    A target is often the size of a plan, and went through a quotient: 32 / 6 for 6 bits, or another plan's
    ``cr``. A budget smaller than that plan by one rounding error would exclude it. Sizes are multiples of
    one bit, so the budget becomes one where it is that close.
    """
    budget = target * float_bytes
    whole = round(8 * budget) / 8
    return (whole, whole / float_bytes) if math.isclose(budget, whole, rel_tol=1e-12) else (budget, target)


def _unreachable(given: float, target: float, low: float, high: float, among: str) -> str:
    """Say that the CR from ``low`` to ``high`` can be reached and ``target``, given as ``given``, cannot."""
    words = f"target_cr {given}" + (f" (a factor, CR {target:.4g})" if given > 1 else "")
    (first, last), (least, most) = _inside(low, high), _inside(1 / high, 1 / low)
    text = (
        f"{words} cannot be reached: with {among}, CR is in [{first}, {last}] (factors {least} to {most}); "
        "pass a target_cr in there"
    )
    if given <= 1 and low <= 1 - target <= high:
        return f"{text}: for a {100 * target:g} % reduction pass {1 - target:g}"
    return f"{text}, or allow {'fewer' if target < low else 'more'} bits"


def _inside(low: float, high: float) -> tuple[float, float]:
    """Round an interval to 4 decimals towards its inside, so that the ends that a message names can be passed."""
    first, last = math.ceil(low * 1e4) / 1e4, math.floor(high * 1e4) / 1e4
    return (first, last) if first <= last else (low, high)
