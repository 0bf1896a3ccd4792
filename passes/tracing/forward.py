"""Record one run of a model as a graph, or tell its author why it cannot be recorded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.tracing.duplicates import duplicate
from fmpq_fx.passes.tracing.examples import of_other_sizes, run_copy
from fmpq_fx.passes.tracing.functions import expect
from fmpq_fx.passes.tracing.model_outputs import check_output, output_of
from fmpq_fx.passes.tracing.patches import patched
from fmpq_fx.passes.tracing.recording import Recording
from fmpq_fx.passes.tracing.refusals import UnrecordableError
from fmpq_fx.passes.tracing.wrappers import image_argument

_ADVICE = (
    "Write that line with operations of torch, or move it into a subclass of compressai.latent_codecs.LatentCodec, "
    "which is kept whole and whose layers are quantized all the same."
)


@dataclass(frozen=True)
class Recorded:
    """A graph, and the modules and tensors that it uses and the model does not have."""

    graph: fx.Graph
    added: dict[str, nn.Module]  # by the name in the graph
    constants: dict[str, Tensor]  # by the name in the graph
    frozen: dict[str, str]  # values that may fit the size of the example alone -> the line that reads them
    kept: bool  # whether some of these may have been kept from an earlier run
    asks_mode: bool  # whether the forward may do something else in training

    def held(self, root: nn.Module) -> dict[str, Any]:
        """Return the modules and tensors that the graph uses, by name; ``root`` is the model."""
        own: dict[str, Any] = {**self.added, **self.constants}
        targets = [str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        return {target: own[target] if target in own else attrgetter(target)(root) for target in targets}

    def same(self, other: "Recorded") -> bool:
        """Say whether ``other`` computes the same."""
        constants = [recorded.constants.items() for recorded in (self, other)]
        return (
            [*map(_operation, self.graph.nodes)] == [*map(_operation, other.graph.nodes)]
            and len(constants[0]) == len(constants[1])
            and all(a == b and v.equal(w) for (a, v), (b, w) in zip(*constants, strict=True))
        )


def record(
    root: nn.Module, example: Tensor, *, training: bool = False, constants: str = "constant"
) -> Recorded:
    """Record the forward of ``root`` on ``example`` (1, C, H, W).

    Args:
        root: the model; it is not touched.
        example: the images that it runs on.
        training: whether to record it in training mode.
        constants: the prefix for the names of tensors that do not belong to the model.

    Raises:
        FmpqError: the forward does something that no graph can do.
    """
    recorded = _record(duplicate(root), example, training, constants)
    if not recorded.kept:
        return recorded
    # A model may keep a mask for images of this size. After it has seen another size, it makes the mask anew.
    warmed = _warmed(root, example, training, constants)
    again = next(warmed, recorded)
    if len(again.frozen) >= len(recorded.frozen):
        return recorded
    another = next(warmed, None)
    return again if another is None else _without_state(again, another)


def _warmed(root: nn.Module, example: Tensor, training: bool, constants: str) -> Iterator[Recorded]:
    """Record the forward on ``example`` by models that have just seen images of other sizes."""
    for other in of_other_sizes(example):
        warm = duplicate(root).train(training)
        try:
            with torch.no_grad():
                output_of(warm, other)
            again = _record(warm, example, training, constants)
        except Exception:  # the user's code may raise anything
            continue
        yield again


def _without_state(recorded: Recorded, other: Recorded) -> Recorded:
    """Return ``recorded`` without the conditions on values that an earlier run left, which differ in ``other``.

    ``if self.height != height`` has the same answer for all sizes but the one of the earlier run, and the code for
    these sizes is right for that one as well.
    """
    graph, nodes = recorded.graph, list(recorded.graph.nodes)
    if len(nodes) == len(other.graph.nodes):
        for node, twin in zip(nodes, other.graph.nodes, strict=True):
            same = node.target is expect and node.args[1:] == twin.args[1:]
            if same and _operation(node.args[0]) != _operation(twin.args[0]):
                graph.erase_node(node)
        _clean(graph)
    return recorded


def _clean(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(lambda node: node.target is expect or node.op in ("placeholder", "output"))
    graph.lint()


def _record(scratch: nn.Module, example: Tensor, training: bool, constants: str) -> Recorded:
    scratch.train(training).requires_grad_(False)
    x = example.clone()
    recording = Recording(scratch, x, image_argument(scratch), constants)
    devices = [] if x.device.type == "cpu" else [x.device]
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), patched(recording, scratch), recording:
            output = scratch(x)
            check_output(output)
            found = _output(recording, output)
    except FmpqError:
        raise
    except Exception as error:
        if not isinstance(error, UnrecordableError) and not training:
            run_copy(scratch, example)  # raises the model's own error, if it is not made for such images
        raise FmpqError(_untraceable(scratch, recording, error)) from error
    graph, state = recording.tape.graph, recording.state
    graph.output(found)
    _clean(graph)
    return Recorded(graph, recording.added, state.constants, state.frozen, state.kept, recording.asks_mode)


def _output(recording: Recording, output: dict[str, Any]) -> dict[str, Any]:
    """Return ``output`` with nodes in the places of values; items that no graph can hold are left out."""
    found = {}
    for key, value in output.items():
        with (
            contextlib.nullcontext()
            if key in ("x_hat", "likelihoods")
            else contextlib.suppress(UnrecordableError)
        ):
            found[key] = recording.values.arguments(value)
    return found


def _operation(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def _untraceable(model: nn.Module, recording: Recording, error: Exception) -> str:
    """Return the error text: the module and the line of the user's code where the trace ended, and what can be done."""
    names = {id(module): name for name, module in model.named_modules()}
    module = recording.stack[-1] if recording.stack else model
    name, cls = names.get(id(module), ""), type(module).__name__
    where = f"module {name!r} ({cls})" if name else f"the forward of {type(model).__name__}"
    what, advice, reason = (
        "does something that cannot be recorded",
        _ADVICE,
        f"\n  {type(error).__name__}: {error}",
    )
    if isinstance(error, UnrecordableError):
        what, advice, reason = error.what, f"{error.advice} {_ADVICE}", ""
    line = recording.lines.of_error(error)
    return f"{type(model).__name__} cannot be traced: {where} {what}\n  {line}{reason}\n{advice}"
