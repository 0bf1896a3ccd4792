"""Quantization-aware training of a rewritten graph with the RD loss."""

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import fx

from fmpq_fx.history import History, Settings
from fmpq_fx.images.distortions import find_distortion
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.plan.tables import Plan
from fmpq_fx.training.loop import Images, train


def finetune(
    gm: fx.GraphModule,
    images: Images,
    *,
    validation: Images | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> History:
    """Train the rewritten graph ``gm`` at its bits, in place.

    The forward pass rounds weights and activations as at run time. The backward pass is the straight-through
    estimator with a leaky clip; steps and zero points are learned (LSQ: Esser et al. 2020, LSQ+: Bhalgat et
    al. 2020). The optimizer is Adam, with learning rates that fall to 0 along half a cosine; entropy bottlenecks have
    CompressAI's auxiliary loss. With ``size_weight`` the loss counts the coded size of the weights as well, for a
    smaller model file: steps grow, and need a larger ``quantizer_lr`` for it. The state with the lowest loss on the
    validation images is kept. The state before the first step is one of these, so this loss never rises.

    Within :func:`fmpq_fx.ranks.joined` all ranks train together, by DistributedDataParallel, and end with the same
    model; rank 0 writes the checkpoint, and all ranks read it.

    Args:
        gm: a graph from :func:`fmpq_fx.prepare` or :func:`fmpq_fx.rewrite`. Its training mode is restored.
        images: a folder, or (3, H, W) or (B, 3, H, W) float tensors in [0, 1]; of at least ``crop`` pixels.
        validation: a folder or tensors to validate on, by 256 x 256 crops from their centres; None holds out a
            tenth of ``images``, one to eight.
        checkpoint: a file that is written at every validation. If it exists, training goes on from it, to the
            result of an uninterrupted run; a finished run is not repeated. It only serves that run: name another
            file, or remove it, to train further.
        workers: processes that read images ahead, for each rank; 0 reads in this process, None chooses.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.
        options: the fields of :class:`fmpq_fx.history.Settings`, by name: ``steps=300``, ``lr=1e-4`` and so on. None
            is the default: ``lmbda`` and ``distortion`` of the plan, :func:`learning_rate` for ``lr``.
            ``distortion`` may be a function, as for :func:`fmpq_fx.prepare`.

    Returns:
        the losses and validations; ``gm`` carries them as well, see :func:`fmpq_fx.passes.annotation.graph_note`.

    Raises:
        TypeError: there is no such option.
        ValueError: an option is out of its range.
        FmpqError: ``gm`` carries no plan, there are too few images or none that is large enough, the checkpoint is of
            another plan, other weights, other images or other settings, or ranks were given different things.
        KeyboardInterrupt: an interruption; ``gm`` is in its best state so far.

    If training diverged, or ended with a higher loss than it began with, a warning says what to try.
    """
    plan = plan_of(gm)
    distortion = find_distortion(options.get("distortion"), plan.metric)
    settings = _settings(plan, {**options, "distortion": distortion.name})
    history = train(
        gm,
        images,
        settings,
        distortion=distortion,
        validation=validation,
        identity=f"plan {hashlib.sha256(plan.to_json().encode()).hexdigest()[:12]}",
        checkpoint=checkpoint,
        workers=workers,
        progress=progress,
    )
    annotate_graph(gm, history=history)
    if history.remarks:
        warnings.warn(history.remarks, stacklevel=2)
    return history


def _settings(plan: Plan, options: Mapping[str, Any]) -> Settings:
    names = [option.name for option in fields(Settings)]
    for name in options:
        if name not in names:
            raise TypeError(f"finetune() has no option {name!r}; its options are {', '.join(names)}")
    if options["distortion"] != plan.metric and options.get("lmbda") is None:
        raise ValueError(
            f"lmbda {plan.lmbda:g} of the plan weighs the distortion {plan.metric}; pass lmbda= for "
            f"{options['distortion']}"
        )
    given = {name: value for name, value in options.items() if value is not None}
    return Settings(**{"lmbda": plan.lmbda, "lr": learning_rate(plan), **given})


def learning_rate(plan: Plan) -> float:
    """Return a learning rate for the weights of a model that was quantized by ``plan``, 3e-5 … 2e-4.

    It grows with the square root of the rise of the RD loss on the calibration images, and is 1e-4 at a rise of a
    tenth. At few bits there is much to repair; at many bits, larger steps of noisy gradients do more harm than good.
    (Found by trial on the sample model: the best of 3e-5, 5e-5, 1e-4 and 2e-4 is the first for float32 and 8 bits,
    and one of the last two for 4 bits.)
    """
    measured = plan.measured
    if measured is None:
        return 1e-4
    rd = measured.rd if plan.rounded_inputs else measured.weights_rd
    damage = max(0.0, rd / measured.float_rd - 1)
    return min(max(1e-4 * math.sqrt(damage / 0.1), Settings.lr), 2e-4)
