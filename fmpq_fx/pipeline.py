"""The whole pass on one screen: trace, measure, plan, rewrite, calibrate."""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx import ranks
from fmpq_fx.errors import FmpqError
from fmpq_fx.images import crops
from fmpq_fx.images.crops import Calibration
from fmpq_fx.memory import bytes_of
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.check_trace import check_trace
from fmpq_fx.passes.clip.ranges import calibrate
from fmpq_fx.passes.clip.scales import choose_scales
from fmpq_fx.passes.measure.coded_sizes import measure_coded_sizes
from fmpq_fx.passes.measure.incremental import mean_rd, parts_of
from fmpq_fx.passes.measure.lazy import plan_lazily
from fmpq_fx.passes.measure.sensitivity import SensitivityMeter, checked_bits, measure_sensitivity
from fmpq_fx.passes.plan.tables import Measured, Plan, Sensitivity
from fmpq_fx.passes.plan.task import make_task, widths_by_site
from fmpq_fx.passes.rewrite import activations_float, quantize
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.examples import synthetic
from fmpq_fx.passes.tracing.wrappers import unwrapped
from fmpq_fx.storage import fingerprint
from fmpq_fx.storage.files import check_folder

SIZES = ("nominal", "coded")


@torch.inference_mode(False)  # what is made within it could not be trained
def prepare(
    model: nn.Module,
    target_cr: float,
    *,
    calibration: Calibration = None,
    lmbda: float | None = None,
    bits: Iterable[int] | None = None,
    activation_bits: int | None = 8,
    planner: str = "adaptive",
    size: str = "nominal",
    fixed: Mapping[str, int | None] | None = None,
    sensitivity: Sensitivity | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> fx.GraphModule:
    """Quantize ``model`` so that its weights take ``target_cr`` of their float32 bytes.

    Within :func:`fmpq_fx.ranks.joined` all ranks share the work, and each returns what one process would, bit for bit.

    Args:
        model: any traceable model whose forward takes images (B, C, H, W) and returns CompressAI's dict of
            ``x_hat`` and ``likelihoods``. It is not modified.
        target_cr: quantized weight bytes / float32 weight bytes, 0.25 for four times smaller; a number above 1
            is read as the factor (4 means 0.25).
        calibration: an image folder, an iterable of (B, C, H, W) float tensors in [0, 1], or None for 256 x 256
            crops of scikit-image's colour photographs. Eight crops suffice.
        lmbda: the Lagrangian of the RD loss; None makes rate and distortion weigh the same on the calibration.
        bits: candidate bit-widths of the weights; None is 2 … 10, or those of ``sensitivity``.
        activation_bits: of every site's input; None keeps activations float.
        planner: "adaptive" (FMPQ's search for beta), "optimal" (knapsack) or "uniform" (the baseline).
        size: what counts as the weights' size: "nominal", parameters * bits / 8, or "coded", the bytes that the
            model file's entropy coder takes for them (see :func:`fmpq_fx.save`), which are fewer. Weight scales
            are then min-max, since finer ones would cost bytes.
        fixed: site names or globs whose bits are given: {"g_s.6": 8, "h_*": 4, "g_a.0": None}; None keeps float32.
        sensitivity: what :func:`analyze` returned for this model, to plan for several targets from one
            measurement, or the incomplete table of another plan, of which only what is missing is measured;
            ``lmbda`` is then left out, or that of the table. None measures what the plan rests on, which leads to
            the plan of the whole table but for what noise decides.
        checkpoint: a file that the table is written to as it is measured, instead of ``sensitivity``. Where it is
            there, only what it lacks is measured; it must be of the same weights and images.
        memory: how much memory activations may be kept in: bytes, or a string as "2GB"; None is a quarter of the
            machine's, or of the GPU's. With less, more is computed again, and the result is the same. Forward
            passes take memory besides, for two images of 256 x 256 at once, sixteen on a GPU.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Returns:
        the rewritten graph, in the training mode, device and dtype of ``model``. It carries its plan
        (:func:`plan_of`).

    Raises:
        ValueError: an argument is out of its range; for an unreachable target the message names what is.
        FmpqError: the model cannot be traced or run on the images, there are no usable images, the RD loss of
            the quantized model is not finite, or the table is of another model, or the checkpoint, or a table that
            is to be completed, of other weights or images; the ranks were given different things.
    """
    bits = None if bits is None else checked_bits(bits)
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; pass one of {', '.join(map(repr, SIZES))}")
    if sensitivity is not None and checkpoint is not None:
        raise ValueError("sensitivity and checkpoint both name a table; pass one of them")
    model = unwrapped(model)
    known = sensitivity or _known(checkpoint)
    ranks.require_same({"the sensitivity": _version(known)})
    batches = _batches_for(model, calibration)
    limit = bytes_of(memory, batches[0].device)
    gm = _traced(model, batches)
    sites, measurable = find_sites(gm), checked_bits(bits) if known is None else known.bits
    coded = None
    if size == "coded":
        given = widths_by_site(fixed, sites)
        coded = measure_coded_sizes(gm, bits or measurable, given, progress=progress)
    task = make_task(  # tells of mistakes before the long measurement
        sites,
        measurable,
        target_cr,
        planner=planner,
        bits=bits,
        fixed=fixed,
        activation_bits=activation_bits,
        coded=coded,
    )
    settings = _settings(model, batches, limit, known, checkpoint)
    widths = bits if known is None else None  # else those of the table, all of them
    meter = SensitivityMeter(gm, batches, lmbda=lmbda, bits=widths, progress=progress, **settings)
    _, channels, height, width = batches[0].shape
    plan = replace(ranks.from_first(plan_lazily(task, meter)), example=(channels, height, width))
    float_rd = meter.float_rd
    del meter  # and the activations that it keeps

    quantized = quantize(gm, plan)
    if size == "nominal":
        weights_rd = choose_scales(quantized, batches, memory=limit, progress=progress)
    else:
        with activations_float(quantized):
            weights_rd = mean_rd(quantized, batches, plan.lmbda)
    rd = calibrate(quantized, batches, memory=limit, progress=progress)
    measured = Measured(float_rd, weights_rd, rd)
    if not (math.isfinite(weights_rd) and math.isfinite(rd)):
        raise FmpqError(
            f"the RD loss of the quantized model is not finite ({measured}); allow more bits, or prepare the model "
            "in float32"
        )
    annotate_graph(quantized, plan=replace(plan_of(quantized), measured=measured))
    return quantized.train(model.training)


def analyze(
    model: nn.Module,
    *,
    calibration: Calibration = None,
    lmbda: float | None = None,
    bits: Iterable[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure how much each candidate bit-width of each site raises the RD loss of ``model``.

    The arguments are those of :func:`prepare`, which takes the table for any number of targets. An interrupted
    measurement goes on from its ``checkpoint``, to the same values; ``lmbda`` and ``bits`` are those of the file,
    or left out.

    Raises:
        ValueError: an argument is out of its range, or ``lmbda`` or ``bits`` is not that of the checkpoint.
        FmpqError: the model cannot be traced or run on the images, there are no usable images, or the checkpoint is of
            another model, other weights or other images.
    """
    model = unwrapped(model)
    known = _known(checkpoint)
    ranks.require_same({"the sensitivity": _version(known)})
    batches = _batches_for(model, calibration)
    limit = bytes_of(memory, batches[0].device)
    gm = _traced(model, batches)
    settings = _settings(model, batches, limit, known, checkpoint)
    return measure_sensitivity(gm, batches, lmbda=lmbda, bits=bits, progress=progress, **settings)


@torch.inference_mode(False)
def rewrite(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """Quantize ``model`` as ``plan`` says, with the scales and ranges that it records.

    Returns:
        the graph that :func:`prepare` returned with that plan, bit for bit, in the training mode, device and
        dtype of ``model``.

    Raises:
        FmpqError: the plan is of another model or not calibrated, or the model cannot be traced.
    """
    quantized = {site for site, bits in plan.bits.items() if bits is not None}
    if plan.activation_bits is not None and not quantized <= plan.ranges.keys():
        raise FmpqError(
            "the plan has no activation ranges, which come from calibration images; pass the plan of a graph that "
            "prepare() returned, or a plan with activation_bits=None"
        )
    model = unwrapped(model)
    return quantize(trace(model, synthetic(model, plan.example)), plan).train(model.training)


def _batches_for(model: nn.Module, calibration: Calibration) -> list[Tensor]:
    """Return the calibration batches, (B, 3, H, W) each, on the device and in the dtype of ``model``.

    Raises:
        FmpqError: the model has no parameters, there are no usable images, or ranks have others.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise FmpqError(f"{type(model).__name__} has no parameters, so there is nothing to quantize")
    given = crops.batches(calibration)
    if ranks.count() > 1:
        pixels = fingerprint.of_images(given)[:12]
        weights = fingerprint.of_model(model)[:12]
        ranks.require_same(
            {
                "the calibration": f"{crops.describe(given)}, {pixels}",
                "the model": f"{type(model).__name__}, weights {weights}",
            }
        )
    return [x.to(parameter.device, parameter.dtype) for x in given]


def _version(sensitivity: Sensitivity | None) -> str:
    if sensitivity is None:
        return "to be measured"
    return f"a table, {hashlib.sha256(sensitivity.to_json().encode()).hexdigest()[:12]}"


def _traced(model: nn.Module, batches: list[Tensor]) -> fx.GraphModule:
    gm = trace(model, batches[0])
    find_sites(gm)  # refuses weights that are not finite, which nothing can be compared with
    # What is measured is run in such parts; a decision on the size would show at another one.
    for x in {x.shape: x for x in parts_of(batches)}.values():
        check_trace(model, gm, x)
    return gm


def _known(checkpoint: str | os.PathLike[str] | None) -> Sensitivity | None:
    """Return the table in the file ``checkpoint``, None where there is none yet."""
    if checkpoint is None:
        return None
    check_folder(checkpoint)
    return Sensitivity.load(checkpoint) if Path(checkpoint).exists() else None


def _settings(
    model: nn.Module,
    batches: list[Tensor],
    memory: int,
    known: Sensitivity | None,
    checkpoint: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Return the arguments of a measurement that tell what it is of, and how it goes on."""
    identity = {"weights": fingerprint.of_model(model), "images": fingerprint.of_images(batches)}
    words = crops.describe(batches)
    return {
        "images": words,
        "identity": identity,
        "memory": memory,
        "known": known,
        "checkpoint": checkpoint,
    }
