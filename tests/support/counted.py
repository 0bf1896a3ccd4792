"""A meter that looks zeta up in a table that was measured in full, and counts."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from fmpq_fx import Plan, Sensitivity
from fmpq_fx.passes.measure.bench import Bench
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.passes.measure.lazy import plan_lazily
from fmpq_fx.passes.measure.sensitivity import Point, SensitivityMeter
from fmpq_fx.passes.plan.tables import Table
from fmpq_fx.passes.plan.task import make_task


class CountedMeter(SensitivityMeter):
    """Takes what it measures from ``full``; what a model would have to run is counted."""

    def __init__(self, full: Sensitivity, known: Sensitivity | None = None):
        self.full = full
        nothing: Table = {site.name: {} for site in full.sites}
        table = known or replace(full, rate=nothing, distortion=nothing, candidates=full.bits)
        super().__init__(ChangeMeter(fx.GraphModule({}, fx.Graph()), Bench((), 0)), table)
        self.rounds: list[int] = []  # points in each
        self.first: CountedMeter | None = None  # takes what it measures from the first images

    def on_first_piece(self) -> SensitivityMeter | None:
        return self.first

    def measure(self, points: Iterable[Point], title: str | None = "") -> None:
        wanted = set(points)
        assert wanted <= set(self.table.missing), "it was measured already, or is no candidate"
        self.rounds.append(len(wanted))

        def more(known: Table, values: Table) -> Table:
            return {
                s: {b: v for b, v in values[s].items() if b in known[s] or (s, b) in wanted} for s in values
            }

        rate, distortion = self.table.rate, self.table.distortion
        self.table = replace(
            self.table, rate=more(rate, self.full.rate), distortion=more(distortion, self.full.distortion)
        )

    @property
    def evaluations(self) -> int:
        """How many runs of the model it would have taken."""
        return sum(self.rounds)


def lazy_plan(
    full: Sensitivity,
    target: float,
    *,
    known: Sensitivity | None = None,
    first: Sensitivity | None = None,
    **options: Any,
) -> tuple[Plan, CountedMeter]:
    """Plan as :func:`fmpq_fx.passes.plan.task.make_plan` does, but lazily; return the plan and what was asked for.

    The table ``first`` is that of the first images.
    """
    meter = CountedMeter(full, known)
    meter.first = None if first is None else CountedMeter(first)
    task = make_task(full.sites, full.bits, target, **options)
    return plan_lazily(task, meter), meter
