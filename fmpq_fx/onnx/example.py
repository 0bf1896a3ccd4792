"""A graph on an example image, and whether ONNX Runtime computes the same from it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from fmpq_fx.errors import FmpqError
from fmpq_fx.onnx.graph import package
from fmpq_fx.onnx.session import Session
from fmpq_fx.passes.parts import Part
from fmpq_fx.passes.tracing.model_outputs import output_of

_SIDE = 128  # pixels

_NOISE = 1e-3
"""How much inputs are moved, relative to their size, to see how much outputs of a graph that rounds may differ."""

_MOST_NOISES = 3
"""Outputs may differ by this many times what such noise does to them…"""

_LEAST = 0.02
"""…and by this much of their own size in any case: in a small part a single value at a tie matters."""


def example_image(channels: int = 3, *, seed: int = 0) -> Tensor:
    """Return noise (1, ``channels``, 128, 128) in 0 to 1, other noise for another ``seed``."""
    return torch.rand(1, channels, _SIDE, _SIDE, generator=torch.Generator().manual_seed(seed))


class Example(ShapeProp):
    """A run of a graph: notes the shapes of all values on its nodes, and keeps the values.

    Args:
        gm: on the CPU, in float32.
        x: an image (1, C, H, W).
    """

    @torch.no_grad()
    def __init__(self, gm: fx.GraphModule, x: Tensor):
        super().__init__(gm)
        self.graph_module = gm
        self.garbage_collect_values = False
        self.constants: dict[fx.Node, Tensor] = {}  # values that depend on no input
        self.channels = x.size(1)
        output_of(self.run, x)
        self.values = dict(self.env)

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` and keep what it computes if it depends on no input."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            constant = n.op not in ("placeholder", "output") and n.op != "call_module"
            if constant and all(read in self.constants for read in n.all_input_nodes):
                self.constants[n] = value.detach()
        return value

    def inputs_of(self, part: Part) -> list[Tensor]:
        """Return what ``part`` reads on the example."""
        return [self.values[node].clone() for node in part.inputs]

    @torch.no_grad()
    def outputs_of(self, part: Part, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what ``part`` makes of ``inputs``, which stay as they are."""
        self.env = self.values | {node: x.clone() for node, x in zip(part.inputs, inputs, strict=True)}
        for node in part.nodes:
            self.env[node] = self.run_node(node)
        return [self.env[node] for node in part.outputs]


def check_runs(example: Example, parts: Sequence[Part], folder: Path) -> str | None:
    """Check that ONNX Runtime loads the graphs of ``parts`` and computes what the parts of the torch graph do.

    A value that lies between two integers may be rounded up by one and down by the other, and later layers make more of
    that. So a graph passes if it differs by no more than the torch graph itself when its input has a little noise;
    and it fails only if it does so on two images, since a tie is one image's and a mistake is every one's.

    Args:
        example: of the graph that was cut into ``parts``.
        parts: of it, whose graphs are compared.
        folder: holds the graphs, by the names of the parts.

    Returns:
        the version of ONNX Runtime; None, with a warning, if it is not installed, and then nothing is checked.

    Raises:
        FmpqError: a graph does not load or run, or computes something else.
    """
    try:
        runtime = package("onnxruntime")
    except FmpqError as error:
        warnings.warn(f"no runtime has run the ONNX graphs that are written: {error}", stacklevel=3)
        return None
    version: str = runtime.__version__
    for part in parts:
        try:
            session = Session((folder / f"{part.name}.onnx").read_bytes())
            difference = _difference(session, part, example)
            if difference is not None:
                other = example_image(example.channels, seed=1)
                difference = _difference(session, part, Example(example.graph_module, other))
        except Exception as error:  # of several types, which onnxruntime does not document
            raise _unusable(part, f"ONNX Runtime {version} does not run it: {error}") from error
        if difference is not None:
            raise _unusable(part, f"ONNX Runtime {version} makes something else of an image: {difference}")
    return version


def _unusable(part: Part, why: str) -> FmpqError:
    return FmpqError(
        f"the ONNX graph of {part.name} cannot be used. {why}. Nothing was written; run the model in torch"
    )


def _difference(session: Session, part: Part, example: Example) -> str | None:
    """Say how the outputs of ``session`` differ from those of ``part``; None if they do not."""
    inputs = example.inputs_of(part)
    expected = example.outputs_of(part, inputs)
    generator = torch.Generator().manual_seed(0)
    noisy = [x + _NOISE * _size(x) * torch.randn(x.shape, generator=generator) for x in inputs]
    others = example.outputs_of(part, noisy)
    for node, ours, theirs, other in zip(part.outputs, session.run(inputs), expected, others, strict=True):
        if ours.shape != theirs.shape:
            return f"{node.name} has the shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        finite = theirs.isfinite() & other.isfinite()
        ours, theirs, other = ours[finite], theirs[finite], other[finite]
        allowed = _LEAST * _size(theirs) + _MOST_NOISES * _size(other - theirs)
        if not _size(ours - theirs) <= allowed:  # one that is not a number is none of these
            return f"{node.name} differs by {_size(ours - theirs):.3g}, where rounding explains {allowed:.3g}"
    return None


def _size(x: Tensor) -> float:
    """Return the root mean square of ``x``; a tiny number for nothing and for zeros."""
    return max(x.double().square().mean().sqrt().item(), 1e-6) if x.numel() else 1e-6
