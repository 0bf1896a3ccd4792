"""The picture of a plan: what it draws, of what format it is, and that its labels can be read."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from compressai.models import ScaleHyperprior
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import fx, nn

from fmpq_fx.passes.annotation import annotate_graph
from fmpq_fx.passes.plan.tables import Plan, Site
from fmpq_fx.report.picture import plot_plan
from support import shown_plans
from support.shown_plans import quantized


@pytest.fixture
def model() -> ScaleHyperprior:
    return shown_plans.model()


@pytest.fixture
def plan() -> Plan:
    return shown_plans.plan()


@pytest.fixture
def gm(model: ScaleHyperprior, plan: Plan) -> fx.GraphModule:
    return quantized(model, plan)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Figure]:
    """Collect the figures instead of rendering them."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    monkeypatch.chdir(tmp_path)
    return drawn


def test_pictures_are_of_the_format_of_their_suffix(gm: fx.GraphModule, plan: Plan, tmp_path: Path) -> None:
    png, svg, pdf = (tmp_path / name for name in ("a.PNG", "b.svg", "c.pdf"))
    png.write_text("an older picture, which is replaced")
    for path in (png, svg, pdf):
        plot_plan(gm, path)
    assert sorted(tmp_path.iterdir()) == [png, svg, pdf]
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 100, "a picture in colour"
    assert pdf.read_bytes().startswith(b"%PDF")
    text = svg.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    words = [*plan.bits, f"CR {plan.cr:.4f}", "RD loss +10.00 %", "bits per weight", "candidate bits", "zeta"]
    assert [word for word in words if word not in text] == []
    assert not pyplot.get_fignums(), "no figure is left in pyplot's global list"


def test_bars_frames_and_colours(model: ScaleHyperprior, plan: Plan, figures: list[Figure]) -> None:
    plot_plan(quantized(model, replace(plan, bits={**plan.bits, "g_a.0": None, "g_s.6": 12})), "plan.png")
    upper, middle, lower = figures[0].axes[:3]
    first, *bars = upper.containers
    bits = [*list(plan.bits.values())[1:-1], 12]
    assert first[0].get_height() == upper.get_ylim()[1], "what stays float reaches to the top"
    assert [bar[0].get_height() for bar in bars] == bits
    assert sum(bar[0].get_height() for bar in middle.containers) == pytest.approx(100)
    assert len({bar[0].get_facecolor() for bar in bars}) == 4, "one colour for each of g_a, h_a, h_s and g_s"
    legend = upper.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()][:4] == ["g_a", "h_a", "h_s", "g_s"]
    rows = [label.get_text() for label in lower.get_yticklabels()]
    assert rows == ["2", "5", "8", "12", "float"]
    frames = [patch.get_y() for patch in lower.patches if isinstance(patch, Rectangle)]
    assert [rows[round(y + 0.5)] for y in frames] == ["float", *map(str, bits)]
    shown = np.ma.masked_invalid(np.asarray(lower.collections[0].get_array()).reshape(5, -1))
    assert shown.mask.all(axis=1).tolist() == [row == "12" for row in rows], "not measured"
    assert shown[0, 0] == pytest.approx(max(100 * plan.sensitivity.zeta["g_a.0"][2], 1e-3))


@pytest.mark.parametrize("count", [1, 5, 60])
def test_labels_do_not_overlap(count: int, plan: Plan, figures: list[Figure]) -> None:
    sites = tuple(Site(f"model.g_{i % 7}.{i}.conv", f"n{i}", "Conv2d", 64 + i) for i in range(count))
    zeta = {site.name: {b: 4.0**-b for b in range(2, 11)} for site in sites}
    table = replace(plan.sensitivity, sites=sites, rate=zeta, distortion=zeta)
    gm = fx.symbolic_trace(nn.Identity())
    bits: dict[str, int | None] = dict.fromkeys(zeta, 10)
    wide = replace(plan, sites=sites, bits=bits, activation_bits=bits, sensitivity=table)
    annotate_graph(gm, model=nn.Identity(), plan=wide)
    plot_plan(gm, "plan.svg")
    figures[0].draw_without_rendering()
    upper, _, lower = figures[0].axes[:3]
    for texts in (upper.texts, lower.get_xticklabels()):
        boxes = [text.get_window_extent() for text in texts]
        assert len(boxes) == count
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    colors = {bar.get_facecolor() for bar in upper.patches}
    assert len(colors) == min(count, 7), "the part that all names share tells no transforms apart"


def test_a_suffix_that_is_no_picture_is_refused(gm: fx.GraphModule, tmp_path: Path) -> None:
    for name in ("plan.gif", "plan", "plan.txt"):
        with pytest.raises(ValueError, match=rf"{name}'.*\.png, \.svg, \.pdf"):
            plot_plan(gm, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        plot_plan(gm, tmp_path / "nowhere" / "plan.png")
    assert not list(tmp_path.iterdir())
