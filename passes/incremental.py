"""Re-run only the part of a graph that a changed layer reaches, and sum up what its RD loss is made of.

The model runs once and every node's value is kept. After that a change re-runs only the nodes downstream of
it, and ends where a value comes out equal to the kept one, which after rounding happens often: in a scale
hyperprior the hyper decoder does not touch the image at all. The values are those of full runs, bit for bit.
"""

from collections import ChainMap
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fmpq_fx import ranks
from fmpq_fx.passes.memory import freed_memory_kept
from fmpq_fx.passes.trace import run
from fmpq_fx.rd import RDSums, squared_error, total_bits

K = TypeVar("K", bound=Hashable)

Change = tuple[str, Callable[[nn.Module], nn.Module]]
"""A site's name, and what makes the module that takes its place from the one that is there."""


class IncrementalInterpreter(fx.Interpreter):
    """Runs a graph once, keeping every node's value, and then only what a change reaches.

    Example::

        interpreter = IncrementalInterpreter(gm)
        before = interpreter.run_once(x)
        with substituted(gm, "g_a.0", quantized):
            after = interpreter.rerun(nodes_of(gm, "g_a.0"))

    ``gm`` must be free of in-place operations (:func:`fmpq_fx.passes.functionalize.functionalize`).
    """

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm, garbage_collect_values=False)
        self.kept: dict[fx.Node, Any] = {}
        self.fresh: dict[fx.Node, Any] = {}  # what the last rerun changed

    def run_once(self, x: Tensor) -> Any:
        """Return the output for ``x`` and keep the values of all nodes."""
        self.kept = {}
        return self.run(x, initial_env=self.kept)

    def rerun(self, changed: Collection[fx.Node]) -> Any:
        """Return the output now that the modules of the nodes ``changed`` are others.

        Values that come out as before are the very objects of the kept run, so that what was computed from
        them need not be computed again.
        """
        self.fresh = {}
        self.env = ChainMap(self.fresh, self.kept)  # type: ignore[assignment]
        for node in self.graph.nodes:
            if node in changed or any(source in self.fresh for source in node.all_input_nodes):
                value = self.run_node(node)
                if not _equal(value, self.kept[node]):
                    self.fresh[node] = value
        return self.env[next(iter(reversed(self.graph.nodes)))]

    def keep(self) -> None:
        """Make the values of the last rerun the kept ones."""
        self.kept.update(self.fresh)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module that is registered under ``target`` now, not the one of the first run."""
        return self.fetch_attr(target)(*args, **kwargs)


def _equal(a: Any, b: Any) -> bool:
    """Compare two values of a node exactly, tensors inside containers included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def nodes_of(gm: fx.GraphModule, site: str) -> set[fx.Node]:
    """Return the nodes of ``gm`` that run ``site``; :func:`fmpq_fx.passes.sites.find_sites` marked them."""
    return {node for node in gm.graph.nodes if site in node.meta.get("fmpq", {}).get("sites", ())}


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered below ``root``, under however many names."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


@contextmanager
def substituted(root: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Within the block, ``module`` stands in ``root`` for the one that ``name`` names."""
    old = root.get_submodule(name)
    replace_module(root, old, module)
    try:
        yield
    finally:
        replace_module(root, module, old)


class IncrementalRD:
    """The RD sums of a graph on one batch, and what they become with a layer exchanged.

    Args:
        gm: a functionalized graph in evaluation mode whose sites are marked.
        x: images (B, 3, H, W) in [0, 1].

    Raises:
        FmpqError: the model cannot run on images of that size, or its output is not CompressAI's.
    """

    def __init__(self, gm: fx.GraphModule, x: Tensor):
        self.gm, self.x = gm, x
        self.interpreter = IncrementalInterpreter(gm)
        self.output: Mapping[str, Any] = run(self.interpreter.run_once, x)
        self.bits = {name: total_bits(p).item() for name, p in self.output["likelihoods"].items()}
        self.error = squared_error(self.output["x_hat"], x).item()

    def sums(self) -> RDSums:
        """Return the RD sums of the graph as it was run last in full or kept."""
        pixels = self.x.size(0) * self.x.size(-2) * self.x.size(-1)
        return RDSums(sum(self.bits.values()), self.error, pixels, self.x.numel())

    def sums_with(self, site: str, module: nn.Module, *, keep: bool = False) -> RDSums:
        """Return the RD sums with ``module`` in the place of ``site``; ``keep`` leaves it there."""
        before = self.output, self.bits, self.error
        with substituted(self.gm, site, module):
            output = self.interpreter.rerun(nodes_of(self.gm, site))
        self.bits = {
            # A likelihood that did not change is the same tensor, and its sum is known.
            name: self.bits[name] if p is self.output["likelihoods"][name] else total_bits(p).item()
            for name, p in output["likelihoods"].items()
        }
        if output["x_hat"] is not self.output["x_hat"]:
            self.error = squared_error(output["x_hat"], self.x).item()
        sums = self.sums()
        if keep:
            self.interpreter.keep()
            self.output = output
            replace_module(self.gm, self.gm.get_submodule(site), module)
        else:
            self.output, self.bits, self.error = before
        return sums


class RDDescent:
    """Lowers the RD loss of a graph by exchanging its layers one after the other.

    The values of all nodes for all batches are kept in memory meanwhile, by each rank those of its share.

    Args:
        gm: a functionalized graph in evaluation mode whose sites are marked; it is changed.
        batches: images, (B, 3, H, W) each, in [0, 1].
        lmbda: the Lagrangian of the RD loss.
    """

    def __init__(self, gm: fx.GraphModule, batches: Sequence[Tensor], lmbda: float):
        self.lmbda = lmbda
        with torch.no_grad():
            self.measured = [IncrementalRD(gm, x) for x in ranks.share(batches)]
        self.rd = _total([m.sums() for m in self.measured]).rd(lmbda)

    @torch.no_grad()
    def best_clip(self, site: str, make: Callable[[float], nn.Module], clips: Sequence[float]) -> float:
        """Put in the place of ``site`` what lowers the RD loss most, and return its clip.

        Args:
            site: name of the site.
            make: from a clip to the module; ``make(1.0)`` is what is there now. It may return the same module
                again and again, changed.
            clips: below 1, descending; they are tried until one is no better than that before it.
        """
        best = 1.0
        for clip in clips:
            module = make(clip)
            rd = _total([m.sums_with(site, module) for m in self.measured]).rd(self.lmbda)
            if not rd < self.rd:
                break
            self.rd, best = rd, clip
        module = make(best)
        if best < 1:
            for m in self.measured:
                m.sums_with(site, module, keep=True)
        return best


def rd_of_changes(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    changes: Mapping[K, Change],
    *,
    description: str = "",
    progress: bool | None = None,
) -> tuple[RDSums, dict[K, RDSums]]:
    """Measure the RD sums of ``gm`` as it is, and with each of ``changes`` made alone.

    Args:
        gm: a functionalized graph in evaluation mode whose sites are marked. It is left as it was.
        batches: images, (B, 3, H, W) each, in [0, 1].
        changes: what to measure.
        description: of the progress bar.
        progress: show a progress bar; None shows it on terminals only.

    Raises:
        FmpqError: see :class:`IncrementalRD`.
    """
    own = dict(ranks.share(list(changes.items())))
    base, changed = RDSums(), dict.fromkeys(own, RDSums())
    hide = None if progress is None else not progress
    total = len(batches) * len(own)
    bar = tqdm(total=total, desc=description, unit="run", disable=hide, leave=False)
    with bar, torch.no_grad(), freed_memory_kept():
        for x in batches:  # outermost, so that the values of one batch at a time are kept
            measured = IncrementalRD(gm, x)
            base += measured.sums()
            for key, (site, make) in own.items():
                changed[key] += measured.sums_with(site, make(gm.get_submodule(site)))
                bar.update()
    return ranks.from_first(base), dict(ranks.merged(list(changed.items())))


class ChangeMeter:
    """Measures the RD sums of a graph as it is, ``base``, and with layers exchanged; see :func:`rd_of_changes`."""

    def __init__(self, gm: fx.GraphModule, batches: Sequence[Tensor]):
        self.gm, self.batches = gm, batches
        self.base, _ = rd_of_changes(gm, batches, {})

    def sums_of(
        self, changes: Mapping[K, Change], *, description: str = "", progress: bool | None = None
    ) -> dict[K, RDSums]:
        """Return the RD sums with each of ``changes`` made alone, whatever else is measured."""
        _, sums = rd_of_changes(self.gm, self.batches, changes, description=description, progress=progress)
        return sums


def mean_rd(gm: fx.GraphModule, batches: Sequence[Tensor], lmbda: float) -> float:
    """Return the RD loss of ``gm``, a model in evaluation mode, over all ``batches`` (B, 3, H, W)."""
    with torch.no_grad(), freed_memory_kept():
        return _total([IncrementalRD(gm, x).sums() for x in ranks.share(batches)]).rd(lmbda)


def _total(shared: Sequence[RDSums]) -> RDSums:
    """Return the sum over the batches of all ranks, in the order in which one process adds them."""
    return sum(ranks.merged(shared), RDSums())
