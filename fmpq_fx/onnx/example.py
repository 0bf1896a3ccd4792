"""Run a graph on example images, and check that runtimes compute the same from its ONNX graphs."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fmpq_fx.errors import FmpqError
from fmpq_fx.onnx.runtimes import RUNTIMES, Session
from fmpq_fx.passes.parts import Part
from fmpq_fx.passes.tracing.model_outputs import output_of

_NOISE = 1e-3
"""Noise that is added to inputs, relative to their size, to see how far outputs of a graph that rounds may differ."""

_MOST_NOISES = 3
"""Outputs may differ by this many times the change that such noise makes…"""

_LEAST = 0.02
"""…plus this fraction of their own size, because in a small part a single value at a tie matters."""


SIZES = ((2, 128, 256), (1, 256, 128))
"""(B, H, W) that graphs are exported with, none of them 1 and no two equal; and another size, to check graphs on."""


def example_images(channels: int, size: tuple[int, int, int] = SIZES[0], seed: int = 0) -> Tensor:
    """Return images of noise (B, ``channels``, H, W) in [0, 1]; ``size`` is (B, H, W)."""
    count, height, width = size
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator, device="cpu")


class Example(fx.Interpreter):
    """A run of a graph that keeps all values.

    Args:
        gm: a graph on the CPU, in float32.
        x: images (B, C, H, W).
    """

    @torch.no_grad()
    def __init__(self, gm: fx.GraphModule, x: Tensor):
        super().__init__(gm, garbage_collect_values=False)
        output_of(self.run, x)
        self.values = dict(self.env)

    def inputs_of(self, part: Part) -> list[Any]:
        """Return copies of the values that ``part`` reads on the example."""
        values = [self.values[node] for node in part.inputs]
        return [value.clone() if isinstance(value, Tensor) else value for value in values]

    @torch.no_grad()
    def outputs_of(self, part: Part, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of ``part`` for ``inputs``, which are not changed."""
        self.env = self.values | dict(zip(part.inputs, inputs, strict=True))
        for node in part.nodes:
            self.env[node] = self.run_node(node)
        return [self.env[node] for node in part.outputs]


def check_runs(
    gm: fx.GraphModule, parts: Sequence[Part], channels: int, folder: Path, runtimes: Sequence[str]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Check that runtimes load the graphs of ``parts`` and compute what the parts of the torch graph compute.

    A value halfway between two integers may be rounded up by one and down by the other, and later layers amplify that.
    So a graph may differ as far as the torch graph itself does when its input has a little noise. It fails only if it
    differs on two images, because a tie happens on one image and a mistake on both. If ``gm`` can run on images of
    another size, the graph is checked on these as well.

    Args:
        gm: the graph that was cut into ``parts``.
        parts: the parts whose graphs are checked.
        channels: the channels of its images.
        folder: the folder of the graphs, which are named like the parts.
        runtimes: the runtimes to check; those that are not installed are left out, with a warning if none is.

    Returns:
        the versions of the runtimes, and {part: {runtime: the reason that it cannot be used for the part}}.

    Raises:
        FmpqError: no runtime can be used for a part.
    """
    versions, missing = {}, []
    for name in runtimes:
        try:
            versions[name] = RUNTIMES[name].version()
        except FmpqError as error:
            missing.append(str(error))
    if not versions:
        warnings.warn(f"no runtime has run the ONNX graphs that are written: {missing[0]}", stacklevel=3)
    examples = [_examples(gm, channels, SIZES[0])]
    try:
        examples.append(_examples(gm, channels, SIZES[1]))
    except Exception as error:  # its forward may allow no other size, and raise anything
        warnings.warn(
            f"the ONNX graphs were checked on images of one size alone, since the model fails at another: {error}",
            stacklevel=3,
        )
    failures: dict[str, dict[str, str]] = {}
    for part in parts:
        model = (folder / f"{part.name}.onnx").read_bytes()
        found = {name: _failure(RUNTIMES[name], model, part, examples) for name in versions}
        failures[part.name] = {name: why for name, why in found.items() if why}
        if failures[part.name] and len(failures[part.name]) == len(versions):
            raise FmpqError(
                f"the ONNX graph of {part.name} cannot be used. {' '.join(failures[part.name].values())}. Nothing was "
                "written; run the model in torch"
            )
        for why in failures[part.name].values():
            warnings.warn(f"the ONNX graph of {part.name} cannot be used everywhere: {why}", stacklevel=3)
    return versions, failures


def _examples(gm: fx.GraphModule, channels: int, size: tuple[int, int, int]) -> list[Example]:
    """Return runs of ``gm`` on two images of one size."""
    return [Example(gm, example_images(channels, size, seed)) for seed in (0, 1)]


def _failure(
    runtime: type[Session], model: bytes, part: Part, examples: Sequence[Sequence[Example]]
) -> str | None:
    """Return why ``runtime`` cannot be used for ``model``, the graph of ``part``; None if it can.

    It can if it computes the same on at least one of the ``examples`` of each size.
    """
    try:
        session = runtime(model)
        for of_one_size in examples:
            differences = (_difference(session, part, example) for example in of_one_size)
            first = next(differences)
            if first is not None and None not in differences:
                return f"{runtime.title} {runtime.version()} makes something else of an image: {first}"
    except Exception as error:  # no runtime documents the types of its errors
        return f"{runtime.title} {runtime.version()} does not run it: {error}"
    return None


def _difference(session: Session, part: Part, example: Example) -> str | None:
    """Return how the outputs of ``session`` differ from those of ``part``; None if they do not."""
    inputs = example.inputs_of(part)
    expected = example.outputs_of(part, inputs)
    generator = torch.Generator().manual_seed(0)
    noisy = [
        x + _NOISE * _size(x) * torch.randn(x.shape, generator=generator) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    others = example.outputs_of(part, noisy)
    for node, ours, theirs, other in zip(part.outputs, session.run(inputs), expected, others, strict=True):
        if not isinstance(theirs, Tensor):
            if ours != theirs:
                return f"{node.name} is {ours.item()} instead of {theirs}"
            continue
        if ours.shape != theirs.shape:
            return f"{node.name} has the shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        finite = theirs.isfinite() & other.isfinite()
        ours, theirs, other = ours[finite], theirs[finite], other[finite]
        allowed = _LEAST * _size(theirs) + _MOST_NOISES * _size(other - theirs)
        if not _size(ours - theirs) <= allowed:  # "not <=": NaN fails too
            return f"{node.name} differs by {_size(ours - theirs):.3g}, where rounding explains {allowed:.3g}"
    return None


def _size(x: Tensor) -> float:
    """Return the root mean square of ``x``, but at least 1e-6."""
    return max(x.double().square().mean().sqrt().item(), 1e-6) if x.numel() else 1e-6
