"""Tables and the picture of rate-distortion points: Bjøntegaard deltas over the lambdas, RD losses at each."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
from bjontegaard import bd_psnr, bd_rate
from figures import save
from rd_points import Point, Variant, curve
from tabulate import tabulate

Points = Mapping[Variant, Point]
Curve = tuple[list[float], list[float]]

METHOD = "akima"  # interpolation between the points of a curve
MARGIN = 0.25  # part of the float curve's span of PSNR that the picture shows beyond its upper end
BELOW = 0.4  # and beyond its lower end

PUBLISHED: dict[str, dict[str, float]] = {
    "bmshj2018-hyperprior": {"FMPQ": 6.48},
    "mbt2018-mean": {"FMPQ": 1.20, "8 bits everywhere": 3.54, "RDO-PTQ": 1.19},
    "cheng2020-anchor": {"FMPQ": 0.89, "8 bits everywhere": 2.05, "RDO-PTQ": 2.95, "DynaQuant": 1.02},
}
"""By architecture: BD-rate (%) at a quarter of the size on Kodak, as works that cite FMPQ report it."""


def _common(everything: Sequence[Points]) -> list[Variant]:
    """Return the variants that were measured at every lambda: float first, then by planner, size and bits."""
    common = {v for v in set.intersection(*(set(points) for points in everything)) if v.loss == "rd"}
    order = {"float": 0, "uniform": 1, "adaptive": 2, "optimal": 3}
    return sorted(
        common,
        key=lambda v: (
            v.size != "nominal",
            order[v.planner],
            -v.target_cr,
            str(v.activation_bits or ""),
            v.activation_budget,
            v.steps,
        ),
    )


def _words(variant: Variant, points: Sequence[Point]) -> list[str]:
    weights, inputs = (
        sum(bits) / len(points)
        for bits in ([p.weight_bits for p in points], [p.activation_bits for p in points])
    )
    bits = f"W{weights:.2f}A{inputs:.1f}".removesuffix(".0")
    cr = "" if variant.planner == "float" else f"{variant.target_cr:g}"
    planner = variant.planner + (", coded" if variant.size == "coded" else "")
    return [planner, cr, bits, f"{variant.steps} steps" if variant.steps else "-"]


def print_table(everything: Sequence[Points], steps: int) -> None:
    """Print BD-rate and BD-PSNR (or BD-MS-SSIM, in dB) of every variant over the lambdas."""
    float_curve = curve(points[Variant()] for points in everything)
    tuned_curve = curve(points[Variant(steps=steps)] for points in everything)
    rows = []
    name = everything[0][Variant()].measure
    for variant in _common(everything):
        points = [at[variant] for at in everything]
        mine = curve(points)
        rows.append(
            [
                *_words(variant, points),
                _delta(bd_rate, float_curve, mine, "{:+.2f} %"),
                _delta(bd_psnr, float_curve, mine, "{:+.3f} dB"),
                _delta(bd_rate, tuned_curve, mine, "{:+.2f} %"),
                f"{max(abs(p.bpp / p.estimated_bpp - 1) for p in points):.2%}",
                str(max(p.deviation for p in points)),
                _real_cr(points),
            ]
        )
    headers = [
        "planner",
        "CR",
        "bits",
        "fine-tuned",
        "BD-rate",
        f"BD-{name}",
        "BD-rate, float fine-tuned",
        "real / estimate",
        "deviation",
        "CR of the file's weights",
    ]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 9)))
    print(
        f"\n~: the curves overlap by less than three quarters of their {name}, so that this is a rough figure"
    )


def print_published(model: str) -> None:
    """Print the published BD-rates of the architecture ``model``, and what was different there."""
    figures = ", ".join(f"{method} {rate:+.2f} %" for method, rate in PUBLISHED.get(model, {}).items())
    if figures:
        print(
            f"\nPublished for {model} at 4x, BD-rate against the float model on Kodak: {figures}.\n"
            "What differs: those models have all their channels and were trained to their end, so that fine-tuning "
            "does not make\nfloat itself better; the bits of their activations, and what their sizes count, are not "
            "known here."
        )


def _real_cr(points: Sequence[Point]) -> str:
    """Return the mean over the lambdas and the range of the bytes that the weights take in the model file."""
    known = [p.coded_cr for p in points if p.coded_cr is not None]
    if len(known) < len(points):
        return "-"
    return f"{sum(known) / len(known):.4f} ({min(known):.4f} … {max(known):.4f})"


def _delta(measure: Callable[..., float], anchor: Curve, curve: Curve, form: str) -> str:
    _, qualities = curve
    if any(after <= before for before, after in pairwise(qualities)):
        return "not rising"  # more bits do not buy more quality, so that there is no rate of a quality
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delta = measure(*anchor, *curve, METHOD)
    if math.isnan(delta):
        return "no overlap"
    return f"~ {form.format(delta)}" if caught else form.format(delta)


def print_losses(everything: Sequence[Points], steps: int) -> None:
    """Print the RD loss of every variant above that of the fine-tuned float model, per lambda."""
    lmbdas = [next(iter(points.values())).lmbda for points in everything]
    rows = []
    for variant in _common(everything):
        points = [at[variant] for at in everything]
        tuned = [at[Variant(steps=steps)] for at in everything]
        above = [
            f"{100 * (p.rd_loss / base.rd_loss - 1):+.2f} %" for p, base in zip(points, tuned, strict=True)
        ]
        rows.append([*_words(variant, points), *above])
    headers = ["planner", "CR", "bits", "fine-tuned", *(f"lambda {lmbda:g}" for lmbda in lmbdas)]
    print("\nRD loss (real bits, 8-bit images) above the float model's, fine-tuned for the same steps:\n")
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * (3 + len(lmbdas)))))


def plot_curves(everything: Sequence[Points], steps: int, path: Path) -> None:
    """Draw quality over bits per pixel: one panel per size, before and after fine-tuning, with float activations."""
    variants = [
        v
        for v in _common(everything)
        if v.planner != "float" and v.activation_bits is None and v.size == "nominal"
    ]
    sizes = sorted({v.target_cr for v in variants}, reverse=True)
    if not sizes:
        return
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(4 * len(sizes), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    colours = {"uniform": "tab:red", "adaptive": "tab:blue", "optimal": "tab:green"}
    for panel, size in zip(panels[0], sizes, strict=True):
        rates, qualities = curve(points[Variant()] for points in everything)
        panel.plot(rates, qualities, "k.-", label="float32")
        for variant in (v for v in variants if v.target_cr == size):
            style = "o-" if variant.steps else "x:"
            label = f"{variant.planner}{', fine-tuned' if variant.steps else ''}"
            panel.plot(
                *curve(points[variant] for points in everything),
                style,
                color=colours[variant.planner],
                label=label,
                markersize=4,
            )
        span = qualities[-1] - qualities[0]
        panel.set_ylim(qualities[0] - BELOW * span, qualities[-1] + MARGIN * span)
        panel.set_title(f"{32 * size:g} bits per weight, A32 ({1 / size:.1f}x smaller)")
        panel.set_xlabel("bits per pixel, real bitstreams")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"{everything[0][Variant()].measure} (dB)")
    handles = {
        label: h for panel in panels[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    panels[0][-1].legend(handles.values(), handles.keys(), fontsize="small")
    save(figure, path)
