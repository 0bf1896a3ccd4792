"""Measure the RD loss of a graph with some of its layers changed, without running all of it again."""

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.measure.bench import Bench, run_fast
from fmpq_fx.passes.measure.groups import Group
from fmpq_fx.passes.measure.kept_values import Budget
from fmpq_fx.passes.measure.rerun import UNCHANGED, Downstream, IncrementalInterpreter, find_downstream
from fmpq_fx.passes.swap import substituted
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.progress import reported
from fmpq_fx.quant import weights_kept
from fmpq_fx.rd import MSE, Distortion, RDSums, total_bits

K = TypeVar("K", bound=Hashable)

Change = Mapping[str, Callable[[nn.Module], nn.Module]]
"""By site (mostly one): a function that makes the new module from the present one."""


class PieceMeter:
    """Measures the RD sums of a graph on one piece of the images, as it is and with layers changed.

    Args:
        gm: a traced graph in evaluation mode.
        x: images (B, C, H, W) in [0, 1].
        downstream: the downstream part of each group of sites that may be changed.
        budget: the memory for node values.
        distortion: the distortion in the RD loss.

    Raises:
        FmpqError: the model cannot run on images of that size, or its output is not CompressAI's.
        ValueError: the budget is too small.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        x: Tensor,
        downstream: Mapping[Group, Downstream],
        budget: Budget,
        distortion: Distortion = MSE,
    ):
        self.x, self.distortion = x, distortion
        self._interpreter = IncrementalInterpreter(gm, downstream, budget)
        output = output_of(self._interpreter.run_once, x)
        self._bits = {name: total_bits(p).item() for name, p in output["likelihoods"].items()}
        self._error = distortion.total(output["x_hat"], x).item()
        self._tried = self._bits, self._error

    @property
    def sums(self) -> RDSums:
        """The RD sums of the graph with the changes that were accepted so far."""
        return self._sums(self._bits, self._error)

    def measure(self, group: Group, *, remember: bool = False) -> RDSums:
        """Return the RD sums now that ``group`` alone is changed.

        Args:
            group: one of the groups that may be changed.
            remember: whether the change may be accepted afterwards.
        """
        self._interpreter.prepare(group, self.x)
        self._tried = self._measured(self._interpreter.rerun(group, remember=remember))
        return self._sums(*self._tried)

    def accept(self) -> None:
        """Take over the change that was measured last: it stays in the graph."""
        self._interpreter.accept()
        self._bits, self._error = self._tried

    def forget(self, group: Group) -> None:
        """Drop the values that are kept for changes of ``group`` alone: it will not be changed again."""
        self._interpreter.forget(group)

    def _measured(self, output: Any) -> tuple[dict[str, float], float]:
        """Return the bits by latent and the distortion of an output that has :data:`UNCHANGED` for unchanged values."""
        if output is UNCHANGED:
            return self._bits, self._error
        bits, error, likelihoods = self._bits, self._error, output["likelihoods"]
        if likelihoods is not UNCHANGED:
            bits = {
                name: self._bits[name] if p is UNCHANGED else total_bits(p).item()
                for name, p in likelihoods.items()
            }
        if output["x_hat"] is not UNCHANGED:
            error = self.distortion.total(output["x_hat"], self.x).item()
        return bits, error

    def _sums(self, bits: Mapping[str, float], error: float) -> RDSums:
        pixels = self.x.size(0) * self.x.size(-2) * self.x.size(-1)
        return RDSums(sum(bits.values()), error, pixels, self.distortion.count(self.x))


class ChangeMeter:
    """Measures the RD sums of a graph with one or a few of its layers exchanged, for any number of changes.

    Example::

        meter = ChangeMeter(gm, make_bench(gm, batches))
        six_bits = {"g_a.0": partial(quantize_layer, bits=6)}
        rise = meter.measure({6: six_bits})[6].rd(lmbda) - meter.measure_base().rd(lmbda)

    The result of a change does not depend, bit for bit, on the other changes, on the memory or on the number of ranks.
    Each rank measures its share of the changes, on all images. Besides the memory of the bench, an evaluation needs the
    memory of a plain run of one piece.

    Args:
        gm: a traced graph in evaluation mode whose sites are marked. It is left as it was.
        bench: the images, the distortion and the memory.
        groups: the groups of sites that are changed together; None is each site alone.
    """

    def __init__(self, gm: fx.GraphModule, bench: Bench, groups: Collection[Group] | None = None):
        self.gm, self.bench = gm, bench
        self.base: RDSums | None = None  # RD sums of the graph as it is; None before the first run
        self._downstream = find_downstream(gm, groups)
        self._pieces: list[PieceMeter] = []
        self._begun: dict[Any, RDSums] = {}  # RD sums on the first piece alone, by change

    def measure_base(self) -> RDSums:
        """Return the RD sums of the graph as it is. The first call runs it, and keeps values for measuring changes.

        Raises:
            FmpqError, ValueError: see :class:`PieceMeter`; or the sums are not finite.
        """
        if self.base is None:
            budget = Budget(self.bench.memory, shares=len(self.bench.pieces))
            with run_fast(self.gm):
                self._pieces = [
                    PieceMeter(self.gm, x, self._downstream, budget, self.bench.distortion)
                    for x in self.bench.pieces
                ]
            self.base = self.bench.ranks.take_first(sum((piece.sums for piece in self._pieces), RDSums()))
            if not (math.isfinite(self.base.rate) and math.isfinite(self.base.distortion)):
                raise FmpqError(
                    f"the model's RD loss on the calibration images is not finite (rate {self.base.rate} bpp, "
                    f"distortion {self.base.distortion}); check the checkpoint, and that the images lie in [0, 1]"
                )
        return self.base

    def measure_first_base(self) -> RDSums:
        """Return the RD sums of the graph as it is on the first piece alone."""
        self.measure_base()
        return self.bench.ranks.take_first(self._pieces[0].sums)

    def measure(
        self, changes: Mapping[K, Change], title: str | None = None, *, begin: bool = False
    ) -> dict[K, RDSums]:
        """Return the RD sums with each of ``changes`` made alone, in their order.

        Args:
            changes: the changes to measure. The same key always stands for the same change.
            title: the title of the progress bar; None shows no bar.
            begin: whether to measure on the first piece alone. Later calls keep that result and run only the others.
        """
        self.measure_base()
        own = dict(self.bench.ranks.share(list(changes.items())))
        groups: dict[Group, list[K]] = {}
        for key, change in own.items():
            groups.setdefault(tuple(change), []).append(key)
        sums = {key: self._begun.get(key, RDSums()) for key in own}
        show = False if title is None else self.bench.progress
        pieces = self._pieces[:1] if begin else self._pieces
        bar = reported(range(len(pieces) * len(own)), title or "", "run", show=show)
        layers = {site: self.gm.get_submodule(site) for group in groups for site in group}
        with bar, run_fast(self.gm):
            for group in sorted(groups, key=list(self._downstream).index):
                modules = {
                    key: {site: make(layers[site]) for site, make in own[key].items()}
                    for key in groups[group]
                }
                with ExitStack() as stack:
                    for of_key in modules.values():
                        for module in of_key.values():
                            stack.enter_context(weights_kept(module))
                    for piece in pieces:
                        for key, of_key in modules.items():
                            if not (key in self._begun and piece is self._pieces[0]):
                                with substituted(self.gm, of_key):
                                    sums[key] += piece.measure(group)
                            bar.update()
        merged = dict(self.bench.ranks.merge(list(sums.items())))
        if begin:
            self._begun.update(merged)
        return merged
