"""Check that the graph of a model computes the same as the model."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import graph_note
from fmpq_fx.passes.tracing.examples import of_other_sizes, run_copy
from fmpq_fx.passes.tracing.functions import DecisionError
from fmpq_fx.passes.tracing.model_outputs import output_of
from fmpq_fx.passes.tracing.torch_calls import RANDOM
from fmpq_fx.passes.tracing.wrappers import unwrapped

_REPEATING = threading.Lock()  # held while cuDNN's settings, which are the whole process's, are changed


@torch.no_grad()
def check_trace(model: nn.Module, gm: fx.GraphModule, x: Tensor) -> None:
    """Run both in evaluation mode and compare bit for bit; ``model`` is not touched.

    Both run on ``x`` (the model twice, to see whether it is random), on a batch of one image or two that ``x`` is not,
    and on an image of another size if both can.

    Args:
        model: the model that was traced.
        gm: its graph.
        x: images (B, C, H, W).

    Raises:
        FmpqError: the outputs differ, are not CompressAI's, or not of the size of ``x``; the model is random, or
            cannot run on images of that size; it takes other decisions on ``x`` than on the traced example.
    """
    with _repeatable(x.device):
        _check(unwrapped(model), gm, x)


def _check(model: nn.Module, gm: fx.GraphModule, x: Tensor) -> None:
    expected = _flat(run_copy(model, x))
    if not _same(expected, _flat(run_copy(model, x))):
        raise FmpqError(
            f"{type(model).__name__} gives another output each time for the same images in evaluation: it draws random "
            f"numbers there{_draws(gm)}{_on_gpu(x)}. Its RD loss cannot be compared with that of a quantized one; "
            "round in evaluation, and add noise in training alone"
        )
    _compare(gm, x, expected)
    other_batch = x[:1] if len(x) > 1 else torch.cat((x, x.flip(-1)))
    _compare(gm, other_batch, _flat(run_copy(model, other_batch)))
    refused: DecisionError | None = None
    for image in of_other_sizes(x):
        try:
            expected = _flat(run_copy(model, image))
        except Exception:  # the model is not made for such images
            continue
        try:
            _compare(gm, image, expected)
        except DecisionError as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        size = f"{x.size(-2)} x {x.size(-1)}"
        warnings.warn(f"the graph may serve images of {size} alone; at another size: {refused}", stacklevel=3)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Within the block, a GPU gives the same bits each time; some of cuDNN's kernels add in an order left to chance."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with _REPEATING:
        before = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def _compare(gm: fx.GraphModule, x: Tensor, expected: list[Tensor]) -> None:
    """Run ``gm`` on ``x``, and refuse it if that fails or gives anything but ``expected``."""
    try:
        found, reason = _flat(output_of(gm, x.clone())), ""  # some models write to their input
    except DecisionError:
        raise
    except FmpqError as error:
        found, reason = [], f"\n  {error}"
    if _same(expected, found):
        return
    frozen = "".join(f"\n  {what}: {where}" for what, where in graph_note(gm).frozen.items())
    causes = f"\nThese are as they were when it was traced, which may be why:{frozen}" if frozen else ""
    raise FmpqError(
        f"the traced graph does not compute what the model computes on images {tuple(x.shape)}.{reason}\nIts forward "
        "uses something that tracing froze, such as a value that is stored between calls, a NumPy number, or a size "
        f"that is turned into text: use operations of torch, and buffers, instead{causes}"
    )


def _flat(output: dict[str, Any]) -> list[Tensor]:
    return [output["x_hat"], *output["likelihoods"].values()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        v.shape == w.shape and torch.allclose(v, w, rtol=0, atol=0, equal_nan=True)
        for v, w in zip(a, b, strict=True)
    )


def _on_gpu(x: Tensor) -> str:
    cause = ", or an operation of it adds in another order each time on a GPU, which a trace on the CPU would show"
    return cause if x.is_cuda else ""


def _draws(gm: fx.GraphModule) -> str:
    found: Iterator[fx.Node] = (
        node for node in gm.graph.nodes if getattr(node.target, "__name__", node.target) in RANDOM
    )
    return "".join(f"\n  {node.stack_trace or node.format_node()}" for node in found)
