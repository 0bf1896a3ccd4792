"""The whole pass on one screen: trace, measure, plan, rewrite, calibrate."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, fx, nn

from fmpq_fx import images, ranks
from fmpq_fx.errors import FmpqError
from fmpq_fx.fingerprint import digest
from fmpq_fx.images import Calibration
from fmpq_fx.passes.calibrate import calibrate
from fmpq_fx.passes.coded_sizes import measure_coded_sizes
from fmpq_fx.passes.functionalize import functionalize
from fmpq_fx.passes.incremental import mean_rd, parts_of
from fmpq_fx.passes.memory import memory_limit
from fmpq_fx.passes.plan import make_plan, widths_by_site
from fmpq_fx.passes.rewrite import plan_of, quantize
from fmpq_fx.passes.scales import choose_scales
from fmpq_fx.passes.sensitivity import checked_bits, measure_sensitivity
from fmpq_fx.passes.sites import annotate, find_sites
from fmpq_fx.passes.tables import Measured, Plan, Sensitivity
from fmpq_fx.passes.trace import check_trace, trace

SIZES = ("nominal", "coded")


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
    memory: int | str | None = None,
    progress: bool | None = None,
) -> fx.GraphModule:
    """Quantize ``model`` so that its weights take ``target_cr`` of their float32 bytes.

    Within :func:`fmpq_fx.ranks.joined` all ranks share the work, and each returns what one process would, bit for bit.

    Args:
        model: any traceable model whose forward takes images (B, 3, H, W) and returns CompressAI's dict of
            ``x_hat`` and ``likelihoods``. It is not modified.
        target_cr: quantized weight bytes / float32 weight bytes, 0.25 for four times smaller; a number above 1
            is read as the factor (4 means 0.25).
        calibration: an image folder, an iterable of (B, 3, H, W) float tensors in [0, 1], or None for 256 x 256
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
            measurement; ``lmbda`` is then left out, or that of the table.
        memory: how much memory activations may be kept in: bytes, or a string as "2GB"; None is a quarter of the
            machine's, or of the GPU's. With less, more is computed again, and the result is the same. Forward
            passes take memory besides, for two images of 256 x 256 at once, sixteen on a GPU.
        progress: show progress bars; None shows them on terminals only.

    Returns:
        the rewritten graph, in the training mode, device and dtype of ``model``. It carries its plan
        (:func:`plan_of`).

    Raises:
        ValueError: an argument is out of its range; for an unreachable target the message names what is.
        FmpqError: the model cannot be traced or run on the images, there are no usable images, or the RD loss of
            the quantized model is not finite; the ranks were given different things.
    """
    progress = progress if ranks.is_first() else False
    bits = None if bits is None else checked_bits(bits)
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; pass one of {', '.join(map(repr, SIZES))}")
    ranks.require_same({"the sensitivity": _version(sensitivity)})
    batches = _batches_for(model, calibration)
    limit = memory_limit(memory, batches[0].device)
    gm = _traced(model, batches)
    draft = sensitivity or _unmeasured(gm, bits)
    coded = None
    if size == "coded":
        given = widths_by_site(fixed, find_sites(gm))
        coded = measure_coded_sizes(gm, bits or draft.bits, given, progress=progress)
    make = partial(
        make_plan,
        target_cr=target_cr,
        planner=planner,
        bits=bits,
        fixed=fixed,
        activation_bits=activation_bits,
        coded=coded,
    )
    make(draft)  # tells of mistakes before the long measurement
    table = _measured_or_given(gm, batches, sensitivity, lmbda, bits, limit, progress)
    plan = ranks.from_first(make(table))

    float_rd = mean_rd(gm, batches, table.lmbda)
    quantized = quantize(gm, plan)
    if size == "nominal":
        choose_scales(quantized, batches, memory=limit, progress=progress)
    weights_rd = mean_rd(quantized, batches, table.lmbda)
    calibrate(quantized, batches, memory=limit, progress=progress)
    measured = Measured(float_rd, weights_rd, mean_rd(quantized, batches, table.lmbda))
    if not (math.isfinite(measured.weights_rd) and math.isfinite(measured.rd)):
        raise FmpqError(
            f"the RD loss of the quantized model is not finite ({measured}); allow more bits, or prepare the model "
            "in float32"
        )
    quantized.meta["fmpq"] = replace(plan_of(quantized), measured=measured)
    return quantized.train(model.training)


def analyze(
    model: nn.Module,
    *,
    calibration: Calibration = None,
    lmbda: float | None = None,
    bits: Iterable[int] | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Measure how much each candidate bit-width of each site raises the RD loss of ``model``.

    The arguments are those of :func:`prepare`, which takes the table for any number of targets.
    """
    progress = progress if ranks.is_first() else False
    batches = _batches_for(model, calibration)
    limit = memory_limit(memory, batches[0].device)
    gm = _traced(model, batches)
    return _measured_or_given(gm, batches, None, lmbda, bits, limit, progress)


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
    return quantize(functionalize(trace(model)), plan).train(model.training)


def _batches_for(model: nn.Module, calibration: Calibration) -> list[Tensor]:
    """Return the calibration batches, (B, 3, H, W) each, on the device and in the dtype of ``model``.

    Raises:
        FmpqError: the model has no parameters, there are no usable images, or ranks have others.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise FmpqError(f"{type(model).__name__} has no parameters, so there is nothing to quantize")
    given = images.batches(calibration)
    if ranks.count() > 1:
        pixels = digest({f"batch {i}": x for i, x in enumerate(given)})[:12]
        weights = digest(model.state_dict())[:12]
        ranks.require_same(
            {
                "the calibration": f"{images.describe(given)}, {pixels}",
                "the model": f"{type(model).__name__}, weights {weights}",
            }
        )
    return [x.to(parameter.device, parameter.dtype) for x in given]


def _version(sensitivity: Sensitivity | None) -> str:
    if sensitivity is None:
        return "to be measured"
    return f"a table, {hashlib.sha256(sensitivity.to_json().encode()).hexdigest()[:12]}"


def _traced(model: nn.Module, batches: list[Tensor]) -> fx.GraphModule:
    gm = functionalize(trace(model))
    find_sites(gm)  # refuses weights that are not finite, which nothing can be compared with
    # What is measured is run in such parts; a decision on the size would show at another one.
    for x in {x.shape: x for x in parts_of(batches)}.values():
        check_trace(model, gm, x)
    return gm


def _unmeasured(gm: fx.GraphModule, bits: Iterable[int] | None) -> Sensitivity:
    """Return a table of zeros for ``gm``, which is enough to find out whether a plan can be made at all."""
    sites = find_sites(gm)
    zeros = {site.name: dict.fromkeys(checked_bits(bits), 0.0) for site in sites}
    return Sensitivity(sites, 1.0, 0.0, 0.0, zeros, zeros, {}, "")


def _measured_or_given(
    gm: fx.GraphModule,
    batches: list[Tensor],
    given: Sensitivity | None,
    lmbda: float | None,
    bits: Iterable[int] | None,
    memory: int,
    progress: bool | None,
) -> Sensitivity:
    if given is None:
        words = images.describe(batches)
        return measure_sensitivity(
            gm, batches, lmbda=lmbda, bits=bits, images=words, memory=memory, progress=progress
        )
    if lmbda is not None and lmbda != given.lmbda:
        raise ValueError(
            f"the sensitivity was measured with lmbda {given.lmbda:g}, and {lmbda:g} was asked for; leave lmbda "
            f"out, or measure again with analyze(model, lmbda={lmbda:g})"
        )
    if find_sites(gm) != given.sites:
        raise FmpqError(
            "the sensitivity is of another model: its sites or their sizes differ; measure this model with analyze()"
        )
    annotate(gm, "zeta", given.zeta)
    return given
