"""The whole pass on one screen: trace, find sites, measure and plan, quantize, choose scales, calibrate."""

import math
import os
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.images.crops import Calibration
from fmpq_fx.images.distortions import Given
from fmpq_fx.job import begin_job
from fmpq_fx.passes.annotation import annotate_graph, plan_of
from fmpq_fx.passes.clip.ranges import calibrate
from fmpq_fx.passes.clip.scales import choose_scales
from fmpq_fx.passes.measure.bench import Bench, mean_rd
from fmpq_fx.passes.measure.coded_sizes import measure_coded_sizes
from fmpq_fx.passes.measure.lazy import plan_lazily
from fmpq_fx.passes.measure.sensitivity import Measurement, begin, checked_bits, measure_sensitivity
from fmpq_fx.passes.plan.tables import Measured, Plan, Sensitivity
from fmpq_fx.passes.plan.task import Task, fixed_widths, make_task
from fmpq_fx.passes.plan.widths import MIXED, ActivationBits, Widths
from fmpq_fx.passes.rewrite import activations_float, quantize
from fmpq_fx.passes.sites import find_sites, left_out
from fmpq_fx.passes.trace import trace
from fmpq_fx.passes.tracing.examples import synthetic
from fmpq_fx.passes.tracing.wrappers import unwrapped

SIZES = ("nominal", "coded")


@torch.inference_mode(False)  # parameters that are made in inference mode cannot be trained
def prepare(
    model: nn.Module,
    target_cr: float,
    *,
    calibration: Calibration = None,
    lmbda: float | None = None,
    bits: Iterable[int] | None = None,
    activation_bits: ActivationBits = MIXED,
    activation_budget: float = 0.1,
    planner: str = "adaptive",
    size: str = "nominal",
    fixed: Widths | None = None,
    sensitivity: Sensitivity | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    distortion: Given | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> fx.GraphModule:
    """Quantize ``model`` so that its weights take ``target_cr`` of their float32 bytes.

    Within :func:`fmpq_fx.ranks.joined` all ranks share the work. Each returns the graph that a single process would
    return, bit for bit.

    Args:
        model: any traceable model whose forward takes images (B, C, H, W) and returns CompressAI's dict of
            ``x_hat`` and ``likelihoods``. It is not modified.
        target_cr: quantized weight bytes / float32 weight bytes, 0.25 for four times smaller; a number above 1
            is read as the factor (4 means 0.25).
        calibration: an image folder, an iterable of (B, C, H, W) float tensors in [0, 1], or None for 256 x 256
            crops of scikit-image's colour photographs. Eight crops suffice. From a folder eight are taken, and 56 more
            for the ranges of activations.
        lmbda: the Lagrangian of the RD loss; None makes rate and distortion weigh the same on the calibration.
        bits: candidate bit-widths of the weights; None is 2 … 10, or those of ``sensitivity``.
        activation_bits: bit-width of the sites' inputs: one number for all; None keeps them float; "mixed" takes 16
            where that saves the most RD loss and 8 elsewhere. A mapping sets single sites, by name or glob, and all
            others are mixed: {"g_s.6": 16, "h_*": None}; {"*": 8, "g_s.6": 16}.
        activation_budget: how many products of 8-bit integers the 16-bit inputs may add, as a fraction of the products
            with 8 bits everywhere. A 16-bit input takes two products where an 8-bit input takes one.
        planner: "adaptive" (FMPQ's search for beta), "optimal" (knapsack) or "uniform" (the baseline).
        size: how the size of the weights is counted: "nominal" is parameters * bits / 8; "coded" is the bytes that the
            model file's entropy coder takes for them (see :func:`fmpq_fx.save`), which are fewer. With "coded",
            weight scales are min-max, because finer ones would cost bytes.
        fixed: bits of single sites, by name or glob: {"g_s.6": 8, "h_*": 4, "g_a.0": None}; None keeps float32.
        sensitivity: the table that :func:`analyze` returned for this model, so that one measurement serves several
            targets. Or the incomplete table of another plan: only the values that it lacks are measured. ``lmbda``
            must then be left out, or equal the table's. None measures only the values that the plan depends on; the
            plan is that of the whole table, except where noise decides.
        checkpoint: a file that the table is written to as it is measured, instead of ``sensitivity``. If it exists,
            only the values that it lacks are measured; it must be of the same weights and images.
        distortion: the distortion that the model was trained for: "mse" (the RD loss is rate + lmbda * 255^2 * MSE),
            "ms-ssim" (rate + lmbda * (1 - MS-SSIM)), or a function of your own
            (:data:`fmpq_fx.images.distortions.Given`). None takes the one of the ``sensitivity`` or of the
            checkpoint, and "mse" without either.
        memory: how much memory kept activations may take: bytes, or a string like "2GB"; None is a quarter of the
            machine's, or of the GPU's. With less memory, more is computed again; the result is the same. Forward
            passes need memory besides, for two images of 256 x 256 at once, sixteen on a GPU.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.

    Returns:
        the rewritten graph, in the training mode, device and dtype of ``model``. It carries its plan
        (:func:`plan_of`).

    Raises:
        ValueError: an argument is out of its range; for an unreachable target the message names the reachable interval.
        FmpqError: the model cannot be traced or run on the images, there are no usable images, the RD loss of
            the quantized model is not finite, the table is of another model, the checkpoint or a table that is to be
            completed is of other weights or images, or the ranks were given different things.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; pass one of {', '.join(map(repr, SIZES))}")
    if not 0 <= activation_budget < math.inf:
        raise ValueError(
            f"activation_budget is {activation_budget!r}; pass a fraction of the products, such as 0.1, or 0"
        )
    bits = None if bits is None else checked_bits(bits)
    job = begin_job(
        model,
        calibration,
        sensitivity=sensitivity,
        checkpoint=checkpoint,
        distortion=distortion,
        memory=memory,
        progress=progress,
    )
    gm = job.trace()
    sites, measurable = find_sites(gm), checked_bits(bits) if job.known is None else job.known.bits
    coded = None
    if size == "coded":
        given = fixed_widths(fixed, sites)
        coded = measure_coded_sizes(gm, bits or measurable, given, ranks=job.ranks, progress=job.progress)
    task = make_task(  # refuses mistakes before the long measurement
        sites,
        measurable,
        target_cr,
        planner=planner,
        bits=bits,
        fixed=fixed,
        activation_bits=activation_bits,
        coded=coded,
    )
    bench = job.make_bench(gm)
    plan, float_rd = _measure_and_plan(gm, bench, job.measurement(lmbda, measurable), task)
    quantized = quantize(gm, replace(plan, example=job.example, left_out=left_out(gm, sites)))
    if size == "nominal":
        choose_scales(quantized, bench)
    rounded = bool(plan.rounded_inputs)
    watched = job.read_more() if rounded else ()
    weights_rd = rd = calibrate(quantized, bench, task.mixed, activation_budget, watched=watched)
    if rounded:
        # Measured now: calibration folds the steps of inputs into the weights.
        with activations_float(quantized):
            weights_rd = mean_rd(quantized, bench, plan.lmbda)
    return _with_measured(quantized, Measured(float_rd, weights_rd, rd)).train(job.model.training)


def _measure_and_plan(
    gm: fx.GraphModule, bench: Bench, measurement: Measurement, task: Task
) -> tuple[Plan, float]:
    """Return the plan and the RD loss of the float model. The activations that measuring keeps are freed on return."""
    meter = begin(gm, bench, measurement)
    return plan_lazily(task, meter), meter.measure_float_rd()


def _with_measured(gm: fx.GraphModule, measured: Measured) -> fx.GraphModule:
    """Write the RD losses ``measured`` into the plan of ``gm``.

    Raises:
        FmpqError: an RD loss is not finite.
    """
    if not (math.isfinite(measured.weights_rd) and math.isfinite(measured.rd)):
        raise FmpqError(
            f"the RD loss of the quantized model is not finite ({measured}); allow more bits, or prepare the model "
            "in float32"
        )
    annotate_graph(gm, plan=replace(plan_of(gm), measured=measured))
    return gm


def analyze(
    model: nn.Module,
    *,
    calibration: Calibration = None,
    lmbda: float | None = None,
    bits: Iterable[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    distortion: Given | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure how much each candidate bit-width of each site raises the RD loss of ``model``.

    The arguments are as for :func:`prepare`, which can use the table for any number of targets. An interrupted
    measurement goes on from its ``checkpoint``, to the same values; ``lmbda`` and ``bits`` must then be left out, or
    equal those of the file.

    Raises:
        ValueError: an argument is out of its range, or ``lmbda`` or ``bits`` differs from the checkpoint.
        FmpqError: the model cannot be traced or run on the images, there are no usable images, or the checkpoint is of
            another model, other weights or other images.
    """
    bits = None if bits is None else checked_bits(bits)
    job = begin_job(
        model, calibration, checkpoint=checkpoint, distortion=distortion, memory=memory, progress=progress
    )
    gm = job.trace()
    return measure_sensitivity(gm, job.make_bench(gm), job.measurement(lmbda, bits))


@torch.inference_mode(False)
def rewrite(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """Quantize ``model`` as ``plan`` says, with the scales and ranges that it records.

    Returns:
        the graph that :func:`prepare` returned with that plan, bit for bit, in the training mode, device and
        dtype of ``model``.

    Raises:
        FmpqError: the plan is of another model or not calibrated, or the model cannot be traced.
    """
    if not plan.calibrated:
        raise FmpqError(
            "the plan has no activation ranges, which come from calibration images; pass the plan of a graph that "
            "prepare() returned"
        )
    model = unwrapped(model)
    return quantize(trace(model, synthetic(model, plan.example)), plan).train(model.training)
