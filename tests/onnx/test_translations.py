"""Sizes that a model computes stay sizes in its graphs: of the images that run, not of the one that was exported."""

from pathlib import Path

import pytest
import torch

import fmpq_fx
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from support.codecs import CODECS
from support.coded_models import graph_of

pytest.importorskip("onnxscript", reason="needs the extra: pip install 'fmpq-fx[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fmpq-fx[onnx]'")


def test_what_is_computed_from_sizes_is_right_at_other_sizes(tmp_path: Path) -> None:
    # The export itself compares each graph with torch's, in each runtime, on images of another size, too.
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = CODECS["MadeInside"]().eval()
    floats = dict.fromkeys(site.name for site in find_sites(trace(model, x)))  # which are exported faster
    gm = graph_of(model, x, fixed=floats)
    manifest = fmpq_fx.export_onnx(gm, tmp_path / "onnx")
    assert "onnxruntime" in manifest.checked_with
    assert not any(part.unusable for part in manifest.parts)
    roles = {part.name: part.inputs for part in manifest.parts}
    assert list(roles) == ["analysis", "hyper_analysis", "hyper_synthesis", "synthesis"]
    assert "x" not in roles["synthesis"], "its dtype alone is read there"
