"""The training loop, for quantized graphs and for float models: RD loss, validation, the best state kept.

Crops and noise of a step are functions of the seed and the step's number alone. So an interrupted run goes on from its
checkpoint to the result of an uninterrupted one, bit for bit on a CPU with the same number of threads; a GPU's
arithmetic is not that repeatable.

Within :func:`fmpq_fx.ranks.joined` each rank takes its share of a step's crops. Together these are the crops that one
process would take, but each rank has its own noise, and sums are rounded differently. So a run is repeatable for the
same number of ranks, and a checkpoint goes on with any number of ranks, on the same crops.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.history import History, Settings
from fmpq_fx.images.crops import cut, describe
from fmpq_fx.images.reading import Source, fingerprint, sources
from fmpq_fx.passes.measure.allocator import freed_memory_kept
from fmpq_fx.progress import reported
from fmpq_fx.quant import quantized_layers
from fmpq_fx.ranks import Ranks, current
from fmpq_fx.rd import MSE, Distortion
from fmpq_fx.storage.files import check_folder
from fmpq_fx.training import data
from fmpq_fx.training.data import RandomCrops
from fmpq_fx.training.run import TrainingRun

Images = str | os.PathLike[str] | Iterable[Tensor | Source]
"""An image folder, or (3, H, W) or (B, 3, H, W) float tensors in [0, 1]."""


@torch.inference_mode(False)  # training needs gradients, even if the caller is in inference mode
def train(
    model: nn.Module,
    images: Images,
    settings: Settings,
    *,
    distortion: Distortion = MSE,
    validation: Images | None = None,
    identity: str = "",
    checkpoint: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place, and leave it in the state of the best validation, without gradients.

    Args:
        model: a rewritten graph, or any model whose forward returns CompressAI's dict. Its training mode is
            restored.
        images: the images to train on.
        settings: the options of training.
        distortion: the distortion that ``settings.distortion`` names.
        validation: images to validate on, by one crop of 256 x 256 from the centre of each (of fewer than eight images,
            eight crops); None holds out a tenth of ``images``, at least one and at most eight.
        identity: a text that identifies the model besides its weights; a checkpoint with another text is refused.
        checkpoint: a file that is written at every validation. If it exists, training goes on from it; the model must
            have the weights of the start or of the end of that run. A finished run is not repeated.
        workers: processes that read images ahead; 0 reads in this process, None chooses.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Raises:
        ValueError: ``settings.batch_size`` is no multiple of the number of ranks, ``workers`` is negative, or
            ``settings.size_weight`` is given for a model without quantized layers.
        FmpqError: the images or the checkpoint cannot be used, or the ranks have different ones.
        KeyboardInterrupt: an interruption, after the best state so far was restored.
    """
    parameter = next(model.parameters())
    ranks = current()
    _check(model, settings, ranks, workers)
    if checkpoint is not None:
        check_folder(checkpoint)
    to_train_on, to_validate_on = _split(images, validation, settings.crop)
    about = {
        "model": identity,
        "images": fingerprint(to_train_on),
        "validation": fingerprint(sources(to_validate_on)),
        **{name: str(value) for name, value in dataclasses.asdict(settings).items()},
    }
    resumed = checkpoint is not None and Path(checkpoint).exists()
    ranks.require_same({**about, "whether the checkpoint is there": str(resumed)})
    mode = model.training
    # One image at a time, so that ranks can share them, and the result is the same for any number of ranks.
    held_out = [image for x in to_validate_on for image in x.to(parameter).split(1)]
    run = TrainingRun(model, held_out, settings, distortion, ranks)
    run.join()
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), freed_memory_kept():
            if checkpoint is not None and resumed:
                run.load(Path(checkpoint), about)
            else:
                run.validate()
            batches = data.batches(
                RandomCrops(to_train_on, settings.crop, settings.seed),
                settings.batch_size,
                range(len(run.losses), settings.steps),
                ranks,
                workers=workers,
                pin_memory=bool(devices),
            )
            with reported(
                batches,
                "training",
                "step",
                total=settings.steps,
                done=len(run.losses),
                every=settings.validate_every,
                leave=True,
                show=progress,
            ) as steps:
                for x in steps:
                    figures = run.step(x.to(parameter, non_blocking=True))
                    if run.diverged:
                        break
                    if run.due:
                        run.validate()
                        if checkpoint is not None and ranks.is_first:
                            run.save(Path(checkpoint), about)
                    validated = f"{run.validation[-1].loss(settings):.4g}"
                    steps.set_postfix({**figures, "validation": validated}, refresh=False)
    finally:
        model.load_state_dict(run.best)
        model.zero_grad()
        model.train(mode)
    return History(
        settings,
        f"{len(to_train_on)} image{'s' * (len(to_train_on) != 1)}",
        describe(to_validate_on),
        tuple(run.losses),
        tuple(run.validation),
        run.remarks,
    )


def _check(model: nn.Module, settings: Settings, ranks: Ranks, workers: int | None) -> None:
    """Refuse now the models and options that would fail, or train badly, after the long work has begun."""
    if workers is not None and workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}; 0 reads images in this process")
    if settings.batch_size % ranks.count:
        raise ValueError(
            f"batch_size counts the crops of all ranks: {settings.batch_size} cannot be shared evenly by "
            f"{ranks.count}; pass a multiple of {ranks.count}"
        )
    if settings.size_weight and not quantized_layers(model):
        raise ValueError(
            f"size_weight {settings.size_weight:g} weighs the coded weights, and the model has no quantized layer; "
            "pass size_weight=0"
        )
    narrow = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if narrow:
        raise FmpqError(
            f"the model is in {', '.join(map(str, narrow))}, which is too coarse to train in: train model.float(), "
            "with bfloat16=True for speed"
        )
    if any(tensor.is_inference() for tensor in model.state_dict().values()):
        raise FmpqError(
            "the model was made or moved within torch.inference_mode(), which leaves tensors that cannot be trained; "
            "do that outside of it, or train a copy, copy.deepcopy(gm)"
        )


def _split(images: Images, validation: Images | None, crop: int) -> tuple[list[Source], list[Tensor]]:
    """Return the images to train on, and the batches to validate on."""
    usable = data.large_enough(sources(images), crop)
    if validation is not None:
        to_validate_on = sources(validation)
        return usable, cut(to_validate_on, count=max(data.HELD_OUT, len(to_validate_on)))
    usable, held_out = data.hold_out(usable)
    return usable, cut(held_out)
