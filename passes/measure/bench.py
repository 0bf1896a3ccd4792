"""Run a model on images in pieces that fit into a processor's caches, in the memory layout that suits the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn

from fmpq_fx.memory import bytes_of
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.swap import substituted
from fmpq_fx.passes.tracing.model_outputs import output_of, ran_out_of_memory
from fmpq_fx.quant import FastConvTranspose2d, quantized_class
from fmpq_fx.quant.layers import QuantizedConvTranspose2d
from fmpq_fx.ranks import ALONE, Ranks
from fmpq_fx.rd import MSE, Distortion, RDSums, rd_sums

PIECE_PIXELS = {"cpu": 2 * 256 * 256, "gpu": 16 * 256 * 256}
"""How many pixels are run at once: few enough for a processor's caches, or enough to keep a GPU busy."""


@dataclass(frozen=True)
class Bench:
    """The images, the distortion and the memory that RD losses are measured with. :func:`make_bench` makes one."""

    # (B, C, H, W) each, in [0, 1]: images that are run at once, in the layout that is fast for the model.
    pieces: tuple[Tensor, ...]
    memory: int  # bytes of activations that may be kept; a forward pass of one piece takes memory besides
    ranks: Ranks = ALONE  # the processes that share the work
    distortion: Distortion = MSE  # the distortion in the RD loss
    progress: bool | None = False  # False shows nothing; see :func:`fmpq_fx.progress.reported`

    @property
    def layout(self) -> torch.memory_format:
        """The layout of the images in memory."""
        last = self.pieces[0].is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format


def make_bench(
    gm: fx.GraphModule,
    batches: Sequence[Tensor],
    *,
    memory: int | None = None,
    ranks: Ranks = ALONE,
    distortion: Distortion = MSE,
    progress: bool | None = False,
) -> Bench:
    """Return a bench of the images ``batches`` for ``gm`` and its rewritten forms.

    On a CPU models run faster with channels last. Some models view their activations in a way that this layout does
    not allow, so one piece is tried.

    Args:
        gm: a graph in evaluation mode.
        batches: images (B, C, H, W) in [0, 1], on the device of ``gm``; at least one batch.
        memory: bytes of activations that may be kept; None is the default of :func:`fmpq_fx.memory.bytes_of`.
        ranks: the processes that share the work.
        distortion: the distortion in the RD loss.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.
    """
    pieces = cut_into_pieces(batches)
    if pieces[0].device.type == "cpu":
        fast = [x.contiguous(memory_format=torch.channels_last) for x in pieces]
        pieces = fast if _runs(gm, fast[0]) else pieces
    return Bench(tuple(pieces), bytes_of(memory, pieces[0].device), ranks, distortion, progress)


def cut_into_pieces(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return ``batches`` (B, C, H, W) in pieces of :data:`PIECE_PIXELS`, of at least one image each."""
    pieces: list[Tensor] = []
    for x in batches:
        pixels = PIECE_PIXELS["cpu" if x.device.type == "cpu" else "gpu"]
        pieces += x.split(max(1, pixels // (x.size(-2) * x.size(-1))))
    return pieces


def mean_rd(gm: fx.GraphModule, bench: Bench, lmbda: float) -> float:
    """Return the RD loss of ``gm``, a model in evaluation mode, over all images of ``bench``."""
    with run_fast(gm):
        own = [rd_sums(output_of(gm, x), x, bench.distortion) for x in bench.ranks.share(bench.pieces)]
    return sum(bench.ranks.merge(own), RDSums()).rd(lmbda)


@contextmanager
def run_fast(gm: fx.GraphModule) -> Iterator[None]:
    """Within the block, ``gm`` runs without gradients, and in less time, with the same values up to rounding."""
    targets = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    fast = {
        target: FastConvTranspose2d(layer)
        for target in targets
        if _is_upsampling(layer := gm.get_submodule(target))
    }
    with torch.no_grad(), freed_memory_kept(), substituted(gm, fast):
        yield


def _is_upsampling(layer: nn.Module) -> TypeGuard[nn.ConvTranspose2d]:
    # A layer with hooks must be called itself.
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return quantized_class(layer) is QuantizedConvTranspose2d and not hooked


@torch.no_grad()
def _runs(gm: fx.GraphModule, x: Tensor) -> bool:
    """Say whether ``gm`` runs on ``x``. Too little memory is no answer, and is raised."""
    try:
        gm(x)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        return False
    return True
