"""Choose where numbers are clipped, site after site: the one way for the scales of weights and the ranges of inputs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.passes.measure.bench import Bench
from fmpq_fx.passes.measure.changes import PieceMeter
from fmpq_fx.passes.measure.kept_values import Budget
from fmpq_fx.passes.measure.rerun import find_downstream
from fmpq_fx.progress import reported
from fmpq_fx.quant import weights_kept
from fmpq_fx.rd import RDSums

EVIDENT = 3e-3
"""By what part of it the RD loss of the first images rises when no more are run to reject a clip.

Of 119 clips tried on the sample model (5.3x and 8x smaller), none was rejected so that lowered the loss of all images;
with 0.001 three were, with 0.0002 seven."""

SetClip = Callable[[float], None]
"""Changes a layer of the graph in place, so that it clips at that part of its whole range; 1 is the whole."""


@torch.no_grad()
def choose_clips(
    gm: fx.GraphModule,
    bench: Bench,
    lmbda: float,
    set_clip: Mapping[str, SetClip],
    clips: Sequence[float],
    title: str,
) -> tuple[dict[str, float], float]:
    """Clip sites of ``gm``, in place, where that lowers the RD loss: one after the other, with all others as they are.

    ::

        RD loss   1.0 ── 0.9 ── 0.8 ── 0.7      the clips of one site
                   │      │      └ lower: taken  └ higher: back to 0.8, and on to the next site
                   │      └ lower: taken
                   └ as it is

    Ranks share the pieces of the images, and each keeps the values of its own.

    Args:
        gm: a traced graph in evaluation mode, with no site clipped.
        bench: what it is measured on.
        lmbda: the Lagrangian of the RD loss.
        set_clip: by site, in the order in which they are decided.
        clips: below 1, descending; they are tried until one is no better than that before it.
        title: of the progress bar.

    Returns:
        the clip of each site, and the RD loss of the graph as it is then.

    Raises:
        FmpqError, ValueError: see :class:`PieceMeter`.
    """
    every = find_downstream(gm)
    own = bench.ranks.share(bench.pieces)
    budget = Budget(bench.memory, shares=len(own))
    with freed_memory_kept(), weights_kept(gm):
        pieces = [
            PieceMeter(gm, x, {site: every[site] for site in set_clip}, budget, bench.distortion) for x in own
        ]
        chosen: dict[str, float] = {}
        for site, set_one in reported(set_clip.items(), title, "site", show=bench.progress):
            chosen[site] = 1.0
            for clip in clips:
                set_one(clip)
                if not _lowers(site, pieces, bench, lmbda):
                    set_one(chosen[site])
                    break
                chosen[site] = clip
                for piece in pieces:
                    piece.accept()
            for piece in pieces:
                piece.forget(site)
        sums = bench.ranks.merge([piece.sums for piece in pieces])
    return chosen, sum(sums, RDSums()).rd(lmbda)


def _lowers(site: str, pieces: Sequence[PieceMeter], bench: Bench, lmbda: float) -> bool:
    """Say whether the change of ``site``, which was made, lowers the RD loss."""
    own = ((piece.sums, piece.measure(site, remember=True)) for piece in pieces)
    before = after = RDSums()
    # Alone, one piece after the other is run as far as the verdict needs it; ranks run theirs at the same time.
    for piece_before, piece_after in own if bench.ranks.count == 1 else bench.ranks.merge(list(own)):
        before += piece_before
        after += piece_after
        if after.rd(lmbda) > before.rd(lmbda) * (1 + EVIDENT):
            return False
    return after.rd(lmbda) < before.rd(lmbda)
