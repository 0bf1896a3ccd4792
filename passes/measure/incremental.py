"""What the RD loss of a graph becomes when one of its layers is exchanged, without running all of it again."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fmpq_fx import ranks
from fmpq_fx.errors import FmpqError
from fmpq_fx.memory import bytes_of
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.measure.kept_values import Budget
from fmpq_fx.passes.measure.rerun import UNCHANGED, IncrementalInterpreter, Reach, find_reach
from fmpq_fx.passes.swap import substituted
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.progress import reported
from fmpq_fx.quant import weights_kept
from fmpq_fx.rd import RDSums, rd_sums, squared_error, total_bits

K = TypeVar("K", bound=Hashable)

Change = tuple[str, Callable[[nn.Module], nn.Module]]
"""A site's name, and what makes the module that takes its place from the one that is there."""

PART_PIXELS = {"cpu": 2 * 256 * 256, "gpu": 16 * 256 * 256}
"""How many pixels are run at once: what suits a processor's caches, and what keeps a GPU busy."""


class IncrementalRD:
    """The RD sums of a graph on some images, and what they become with a layer exchanged.

    Args:
        gm: a traced graph in evaluation mode.
        x: images (B, 3, H, W) in [0, 1].
        reach: of the sites that may be exchanged.
        budget: for the values that are kept.

    Raises:
        FmpqError: the model cannot run on images of that size, or its output is not CompressAI's.
        ValueError: the budget is too small.
    """

    def __init__(self, gm: fx.GraphModule, x: Tensor, reach: Mapping[str, Reach], budget: Budget):
        self.gm, self.x = gm, x
        self.interpreter = IncrementalInterpreter(gm, reach, budget)
        output = run_part(self.interpreter.run_once, x)
        self.bits = {name: total_bits(p).item() for name, p in output["likelihoods"].items()}
        self.error = squared_error(output["x_hat"], x).item()
        self._tried = self.bits, self.error

    @property
    def sums(self) -> RDSums:
        """The RD sums of the graph as it was run first, with what was accepted since."""
        return self._sums(self.bits, self.error)

    def sums_with(self, site: str, module: nn.Module, *, remember: bool = False) -> RDSums:
        """Return the RD sums with ``module`` in the place of ``site``.

        Args:
            site: its name.
            module: what is to be there for the time of the measurement.
            remember: the change may be accepted afterwards.
        """
        self.interpreter.prepare(site, self.x)
        with substituted(self.gm, site, module):
            output = self.interpreter.rerun(site, remember=remember)
        self._tried = bits, error = self._measured(output)
        return self._sums(bits, error)

    def accept(self) -> None:
        """Take over what was measured last; the module is to be put into the graph for good."""
        self.interpreter.accept()
        self.bits, self.error = self._tried

    def _measured(self, output: Any) -> tuple[dict[str, float], float]:
        """Return bits by latent and squared error of an output in which only what changed is there."""
        if output is UNCHANGED:
            return self.bits, self.error
        bits, error, likelihoods = self.bits, self.error, output["likelihoods"]
        if likelihoods is not UNCHANGED:
            bits = {
                name: self.bits[name] if p is UNCHANGED else total_bits(p).item()
                for name, p in likelihoods.items()
            }
        if output["x_hat"] is not UNCHANGED:
            error = squared_error(output["x_hat"], self.x).item()
        return bits, error

    def _sums(self, bits: Mapping[str, float], error: float) -> RDSums:
        pixels = self.x.size(0) * self.x.size(-2) * self.x.size(-1)
        return RDSums(sum(bits.values()), error, pixels, self.x.numel())


def parts_of(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return ``batches`` (B, 3, H, W) cut into parts of as many images as are run at once, at least one."""
    parts: list[Tensor] = []
    for x in batches:
        pixels = PART_PIXELS["cpu" if x.device.type == "cpu" else "gpu"]
        parts += x.split(max(1, pixels // (x.size(-2) * x.size(-1))))
    return parts


def run_part(model: Callable[[Tensor], Any], x: Tensor) -> dict[str, Any]:
    """Return the checked output of ``model`` for the images ``x`` (B, 3, H, W), with the faster memory layout.

    On a CPU that is channels last, unless the model has a view of its activations that this layout does not allow.

    Raises:
        FmpqError: see :func:`fmpq_fx.passes.tracing.model_outputs.output_of`.
    """
    if x.device.type == "cpu":
        with suppress(FmpqError):
            return output_of(model, x.contiguous(memory_format=torch.channels_last))
    return output_of(model, x)


def measured_parts(
    gm: fx.GraphModule, parts: Sequence[Tensor], reach: Mapping[str, Reach], memory: int | None
) -> list[IncrementalRD]:
    """Return the measured ``parts``, which share the ``memory``."""
    if not parts:  # more ranks than parts
        return []
    budget = Budget(bytes_of(memory, parts[0].device), shares=len(parts))
    return [IncrementalRD(gm, x, reach, budget) for x in parts]


class ChangeMeter:
    """Measures the RD sums of a graph with one of its layers exchanged, for any number of layers and exchanges.

    Example::

        meter = ChangeMeter(gm, batches)
        six_bits = {"g_a.0": ("g_a.0", partial(quantize_layer, bits=6))}
        rise = meter.sums_of(six_bits)["g_a.0"].rd(lmbda) - meter.base.rd(lmbda)

    What a change gives does not depend, bit for bit, on what else is measured or on ``memory``. A batch is run in
    parts of :data:`PART_PIXELS`.

    Args:
        gm: a traced graph in evaluation mode whose sites are marked. It is left as it was.
        batches: images, (B, 3, H, W) each, in [0, 1].
        memory: bytes of activations to keep at most; see :func:`fmpq_fx.memory.bytes_of`. An evaluation
            takes besides what a plain run of one part takes.

    Raises:
        FmpqError, ValueError: see :class:`IncrementalRD`.
    """

    def __init__(self, gm: fx.GraphModule, batches: Sequence[Tensor], *, memory: int | None = None):
        self.gm = gm
        self._reach = find_reach(gm)
        with torch.no_grad(), freed_memory_kept():
            self._parts = measured_parts(gm, parts_of(batches), self._reach, memory)
        self.base = ranks.from_first(sum((part.sums for part in self._parts), RDSums()))

    @torch.no_grad()
    def sums_of(
        self, changes: Mapping[K, Change], *, description: str = "", progress: bool | None = None
    ) -> dict[K, RDSums]:
        """Return the RD sums with each of ``changes`` made alone, in their order.

        Args:
            changes: what to measure.
            description: of the progress bar.
            progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.
        """
        own = dict(ranks.share(list(changes.items())))
        keys: dict[str, list[K]] = {site: [] for site in self._reach}  # in the order of the graph
        for key, (site, _) in own.items():
            keys[site].append(key)
        sums = dict.fromkeys(own, RDSums())
        total = len(self._parts) * len(own)
        bar = reported(range(total), description, "run", show=progress)
        with bar, freed_memory_kept():
            for site, its_keys in keys.items():
                layer = self.gm.get_submodule(site)
                modules = {key: changes[key][1](layer) for key in its_keys}
                with ExitStack() as stack:
                    for module in modules.values():
                        stack.enter_context(weights_kept(module))
                    for part in self._parts:
                        for key, module in modules.items():
                            sums[key] += part.sums_with(site, module)
                            bar.update()
        return dict(ranks.merged(list(sums.items())))


def mean_rd(gm: fx.GraphModule, batches: Sequence[Tensor], lmbda: float) -> float:
    """Return the RD loss of ``gm``, a model in evaluation mode, over all ``batches`` (B, 3, H, W)."""
    with torch.no_grad(), freed_memory_kept():
        sums = total_of_ranks([rd_sums(run_part(gm, x), x) for x in ranks.share(parts_of(batches))])
    return sums.rd(lmbda)


def total_of_ranks(shared: Sequence[RDSums]) -> RDSums:
    """Return the sum over the parts of all ranks, in the order in which one process adds them."""
    return sum(ranks.merged(shared), RDSums())
