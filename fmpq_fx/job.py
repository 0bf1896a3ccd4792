"""The job of ``prepare`` and ``analyze``: arguments are checked, and the model is traced, before the long work."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.images import crops
from fmpq_fx.images.crops import Calibration
from fmpq_fx.images.distortions import Given, find_distortion
from fmpq_fx.memory import bytes_of
from fmpq_fx.passes.check_trace import check_trace
from fmpq_fx.passes.measure.bench import Bench, cut_into_pieces, make_bench
from fmpq_fx.passes.measure.sensitivity import Measurement
from fmpq_fx.passes.plan.tables import Sensitivity
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.wrappers import unwrapped
from fmpq_fx.ranks import Ranks, current
from fmpq_fx.rd import MSE, Distortion
from fmpq_fx.storage import fingerprint
from fmpq_fx.storage.files import check_folder


@dataclass(frozen=True)
class Job:
    """A model, the images to measure it on, and the options of measuring."""

    model: nn.Module  # the caller's, out of its DataParallel or compiled wrapper; it is not modified
    batches: list[Tensor]  # (B, C, H, W) each, in [0, 1], on the model's device and in its dtype
    calibration: Calibration  # the argument that the batches were read from
    memory: int  # bytes of activations that may be kept
    known: Sensitivity | None  # the table of what is measured already: the caller's, or the checkpoint's
    checkpoint: str | os.PathLike[str] | None  # the file that the table is written to
    distortion: Distortion  # the distortion in the RD loss
    ranks: Ranks  # the processes that share the work
    progress: bool | None  # False shows nothing; see :func:`fmpq_fx.progress.reported`

    @property
    def example(self) -> tuple[int, int, int]:
        """Channels, height and width of the image that the model is traced with."""
        _, channels, height, width = self.batches[0].shape
        return channels, height, width

    def trace(self) -> fx.GraphModule:
        """Return the graph of the model, out-of-place, with its sites marked; it computes the same on the images.

        Raises:
            FmpqError: the model cannot be traced, has nothing to quantize, or cannot run on the images.
        """
        gm = trace(self.model, self.batches[0])
        find_sites(gm)  # refuses weights that are not finite, which nothing can be compared with
        # Measuring runs the graph on pieces of these shapes; a forward that decides by the shape is refused here.
        for x in {x.shape: x for x in cut_into_pieces(self.batches)}.values():
            check_trace(self.model, gm, x)
        return gm

    def read_more(self) -> list[Tensor]:
        """Return further images (B, C, H, W) of the calibration, for the ranges of activations."""
        return _moved(crops.more(self.calibration), self.batches[0])

    def make_bench(self, gm: fx.GraphModule) -> Bench:
        """Return the bench that the RD losses of ``gm`` are measured on."""
        return make_bench(
            gm,
            self.batches,
            memory=self.memory,
            ranks=self.ranks,
            distortion=self.distortion,
            progress=self.progress,
        )

    def measurement(self, lmbda: float | None, bits: tuple[int, ...] | None) -> Measurement:
        """Return the order to measure the candidate widths ``bits`` at the Lagrangian ``lmbda``; None is a default."""
        identity = {
            "weights": fingerprint.of_model(self.model),
            "images": fingerprint.of_images(self.batches),
        }
        return Measurement(
            lmbda, bits, crops.describe(self.batches), identity, known=self.known, checkpoint=self.checkpoint
        )


def begin_job(
    model: nn.Module,
    calibration: Calibration,
    *,
    sensitivity: Sensitivity | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    distortion: Given | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Job:
    """Check these arguments of :func:`fmpq_fx.prepare` and read the images; all ranks that share the work must call it.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range.
        FmpqError: the model wants more than images or has no parameters, there are no usable images, the checkpoint is
            no table, or the ranks were given different things.
    """
    model, ranks = unwrapped(model), current()
    if sensitivity is not None and checkpoint is not None:
        raise ValueError("sensitivity and checkpoint both name a table; pass one of them")
    known = sensitivity or _read(checkpoint)
    chosen = find_distortion(distortion, MSE.name if known is None else known.metric)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise FmpqError(f"{type(model).__name__} has no parameters, so there is nothing to quantize")
    given = crops.batches(calibration)
    if ranks.count > 1:
        pixels, weights = fingerprint.of_images(given)[:12], fingerprint.of_model(model)[:12]
        ranks.require_same(
            {
                "the sensitivity": _version(known),
                "the distortion": chosen.name,
                "the calibration": f"{crops.describe(given)}, {pixels}",
                "the model": f"{type(model).__name__}, weights {weights}",
            }
        )
    return Job(
        model,
        _moved(given, parameter),
        calibration,
        bytes_of(memory, parameter.device),
        known,
        checkpoint,
        chosen,
        ranks,
        progress,
    )


def _moved(images: list[Tensor], like: Tensor) -> list[Tensor]:
    return [x.to(like.device, like.dtype) for x in images]


def _read(checkpoint: str | os.PathLike[str] | None) -> Sensitivity | None:
    """Return the table in the file ``checkpoint``, None where there is none yet."""
    if checkpoint is None:
        return None
    check_folder(checkpoint)
    return Sensitivity.load(checkpoint) if Path(checkpoint).exists() else None


def _version(sensitivity: Sensitivity | None) -> str:
    if sensitivity is None:
        return "to be measured"
    return f"a table, {hashlib.sha256(sensitivity.to_json().encode()).hexdigest()[:12]}"
