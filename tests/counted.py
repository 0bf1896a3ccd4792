"""A meter that looks zeta up in a table that was measured in full, and counts."""

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from fmpq_fx import Plan, Sensitivity
from fmpq_fx.passes.lazy import plan_lazily
from fmpq_fx.passes.plan import make_task
from fmpq_fx.passes.sensitivity import Point, SensitivityMeter


class CountedMeter(SensitivityMeter):
    """Takes what it measures from ``full``; what a model would have to run is counted."""

    def __init__(self, full: Sensitivity):
        self.full, self.gm = full, fx.GraphModule({}, fx.Graph())
        nothing = {site.name: {} for site in full.sites}
        self.table = replace(full, rate=nothing, distortion=nothing, candidates=full.bits)
        self.rounds: list[int] = []  # points in each

    def measure(self, points: Iterable[Point]) -> None:
        wanted = set(points)
        assert wanted <= set(self.table.missing), "it was measured already, or is no candidate"
        self.rounds.append(len(wanted))

        def more(known, values):  # type: ignore[no-untyped-def]
            return {
                s: {b: v for b, v in values[s].items() if b in known[s] or (s, b) in wanted} for s in values
            }

        self.table = replace(
            self.table,
            rate=more(self.table.rate, self.full.rate),
            distortion=more(self.table.distortion, self.full.distortion),
        )

    @property
    def evaluations(self) -> int:
        """How many runs of the model it would have taken."""
        return sum(self.rounds)


def lazy_plan(full: Sensitivity, target: float, **options) -> tuple[Plan, CountedMeter]:  # type: ignore[no-untyped-def]
    meter = CountedMeter(full)
    task = make_task(full.sites, full.bits, target, **options)
    return plan_lazily(task, meter), meter
