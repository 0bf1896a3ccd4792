"""Draw the plan that a rewritten graph carries."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import fx

from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.plan.tables import Plan
from fmpq_fx.report.table import factor, percent, short_bits, sizes
from fmpq_fx.storage.files import WRITER, check_folder, replacing

PICTURE_FORMATS = ("png", "svg", "pdf")  # formats of plot_plan, which the suffix of the file selects
ZETA_SHOWN = (1e-3, 1e2)  # in %: the ends of the colour scale, the same for all models


def plot_plan(gm: fx.GraphModule, path: str | os.PathLike[str]) -> None:
    """Draw the plan of ``gm``: bits, share of the bytes and zeta of each site, in the order of the graph.

    Args:
        gm: a rewritten graph.
        path: the file to write, in the format that its suffix names: png, svg or pdf.

    Raises:
        FmpqError: ``gm`` is not the result of ``prepare`` or ``rewrite``.
        ValueError: the suffix is another one.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    plan, suffix = plan_of(gm), check_plot_path(path)
    figure = _draw(plan, type(gm).__name__)
    writer = {"Software" if suffix == "png" else "Creator": WRITER}
    with replacing(path) as file:
        figure.savefig(file, format=suffix, dpi=150, metadata=writer)


def check_plot_path(path: str | os.PathLike[str]) -> str:
    """Return the format that the suffix of ``path`` names; for a check before a long run that ends with a picture.

    Raises:
        ValueError: :func:`plot_plan` does not write that format.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in PICTURE_FORMATS:
        names = ", ".join(f".{name}" for name in PICTURE_FORMATS)
        raise ValueError(f"cannot draw {str(path)!r}: its suffix must be one of {names}")
    check_folder(path)
    return suffix


def _draw(plan: Plan, model: str) -> Figure:
    """Return the picture, wide enough for a column for each site's name."""
    names = [site.name for site in plan.sites]
    width = min(max(9.0, 3.5 + 0.36 * len(names)), 26.0)  # inches, 3.5 of them for labels
    font = min(9.0, 72 * 0.7 * (width - 3.5) / len(names))  # points: a column, less some air
    height = 6.5 + max(map(len, names)) * 0.65 * font / 72
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1.3, 4.5))
    _draw_bits(upper, middle, plan, font)
    _draw_zeta(figure, lower, plan)
    loss = "not measured" if plan.measured is None else percent(plan.measured.rd / plan.measured.float_rd - 1)
    title = f"{model} at {short_bits(plan)}: {sizes(plan)}, {factor(plan.cr)}"
    title += f"\n{plan.planner} plan, CR {plan.cr:.4f} (target {plan.target_cr:.4g}), RD loss {loss}"
    upper.set_title(title, fontsize=12, loc="left")
    lower.set_xticks(range(len(names)), names, rotation=90, fontsize=font)
    lower.set(xlabel="site, in the order of the graph", xlim=(-0.5, len(names) - 0.5))
    for axes in (upper, middle):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(bottom=False)
    return figure


def _colors(plan: Plan) -> dict[str, tuple[str, Any]]:
    """Return {site: (transform, its colour)}; the transform is the first part of the name in which names differ."""
    parts = [site.name.split(".") for site in plan.sites]
    part = 0
    while len({p[part] for p in parts}) == 1 and min(map(len, parts)) > part + 2:
        part += 1
    order = list(dict.fromkeys(p[part] for p in parts))
    palette = colormaps["Dark2"]
    return {".".join(p): (p[part], palette(order.index(p[part]) % palette.N)) for p in parts}


def _draw_bits(axes: Axes, shares: Axes, plan: Plan, font: float) -> None:
    """Draw two bars per site, coloured by transform; the bars of float sites are hatched and reach to the top."""
    colors = _colors(plan)
    top = 1.15 * max([plan.average_bits, *(b for b in plan.bits.values() if b is not None)])
    for i, site in enumerate(plan.sites):
        b, color = plan.bits[site.name], colors[site.name][1]
        shares.bar(i, 100 * plan.bytes_of(site) / plan.size_bytes, color=color)
        if b is None:
            axes.bar(i, top, color="white", edgecolor=color, hatch="///")
            text = axes.text(i, top / 2, "float", rotation=90)
        else:
            axes.bar(i, b, color=color)
            text = axes.annotate(str(b), (i, b), (0, 0.8 * font), textcoords="offset points")
        text.set(ha="center", va="center", fontsize=font, bbox={"color": "white", "pad": 0.3})
    line = axes.axhline(plan.average_bits, color="black", linestyle="--", linewidth=1)
    line.set_label(f"average: {plan.average_bits:.1f} bits")
    keys = [Patch(color=color, label=transform) for transform, color in dict(colors.values()).items()]
    axes.legend(handles=[*keys, line], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylabel="bits per weight", ylim=(0, top))
    shares.set_ylabel("% of\nthe bytes")


def _draw_zeta(figure: Figure, axes: Axes, plan: Plan) -> None:
    """Draw zeta as colours over sites and widths, with a row for float if a site is float; frame the chosen bits."""
    chosen = [plan.bits[site.name] for site in plan.sites]
    rows: list[int | None] = [*sorted({*plan.sensitivity.bits, *(b for b in chosen if b is not None)})]
    rows += [None] * (None in chosen)
    table = plan.sensitivity.zeta
    zeta = [[0.0 if b is None else table[s.name].get(b, math.nan) for s in plan.sites] for b in rows]
    shown = np.clip(100 * np.array(zeta), ZETA_SHOWN[0], None)
    x, y = np.arange(len(chosen) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    mesh = axes.pcolormesh(x, y, shown, norm=LogNorm(*ZETA_SHOWN), cmap="YlOrRd", edgecolor="white", lw=0.3)
    for i, b in enumerate(chosen):
        corner = (i - 0.5, rows.index(b) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, lw=1.5, zorder=3, clip_on=False))
    guessed = [
        (i, rows.index(b))
        for i, s in enumerate(plan.sites)
        for b in plan.sensitivity.bits
        if b not in plan.sensitivity.raw[s.name] and not math.isnan(table[s.name][b])
    ]
    if guessed:
        axes.plot(*zip(*guessed, strict=True), ".", color="gray", markersize=2)
    axes.set_facecolor("lightgray")
    axes.set_yticks(range(len(rows)), ["float" if b is None else str(b) for b in rows])
    axes.set_ylabel("candidate bits")
    scale = axes.inset_axes((1 + 0.15 / figure.get_figwidth(), 0, 0.2 / figure.get_figwidth(), 1))
    label = "zeta: rise of the RD loss\nif only this site is quantized, %"
    figure.colorbar(mesh, cax=scale, extend="both", format="%g", label=label)
    keys: list[Artist] = [Patch(fill=False, lw=1.5, label="chosen bits")]
    keys += [Line2D([], [], color="gray", marker=".", linestyle="", label="interpolated")] * bool(guessed)
    keys += [Patch(color="lightgray", label="not measured")] * bool(np.isnan(shown).any())
    axes.legend(handles=keys, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0)
