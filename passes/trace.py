"""Trace a learned image compression model into a torch.fx graph.

Entropy models and latent codecs branch on data, and the default tracer fails on all of CompressAI's models
for it. They stay opaque here, and so does every layer that can be quantized; all other modules, a user's own
included, are traced into.
"""

import copy
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from compressai.entropy_models import EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_graph
from fmpq_fx.passes.forward import output_of
from fmpq_fx.passes.sites import check_weights
from fmpq_fx.quant import QuantizedLayer, QuantizeLatent, quantized_class


class LicTracer(fx.Tracer):
    """A tracer that keeps quantizable layers, entropy models and latent codecs whole."""

    forward_of_root: tuple[str, str] = ("", "")  # file and name of the forward that is being traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether ``m`` becomes one node instead of being traced into."""
        return (
            quantized_class(m) is not None
            or isinstance(m, EntropyModel | LatentCodec | QuantizeLatent | QuantizedLayer)
            or m.__module__.startswith("compressai.ops.")  # autograd functions, which cannot be traced
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that knows which line of the model's forward it came from, for ``print_readable``."""
        node: fx.Node = super().create_node(*args, **kwargs)
        frames = traceback.extract_stack()
        frame = next((f for f in frames if (f.filename, f.name) == self.forward_of_root), None)
        if frame is not None:
            # The end of the path suffices to find the line, and says nothing of whose machine this is.
            file = "/".join(Path(frame.filename).parts[-3:])
            node.stack_trace = f'File "{file}", line {frame.lineno}, in {frame.name}\n    {frame.line}'
        return node

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of ``root``; rounding by an entropy model becomes a module of its own in it."""
        code = getattr(type(root).forward, "__code__", None)
        self.forward_of_root = (code.co_filename, code.co_name) if code else ("", "")
        with _latents_quantized_by_module(self):
            return super().trace(root, concrete_args)


@contextmanager
def _latents_quantized_by_module(tracer: LicTracer) -> Iterator[None]:
    """Record ``entropy_model.quantize`` as a call of a :class:`QuantizeLatent`, where that does the same.

    fx intercepts calls of modules, not of their methods; like fx does for those, the method is replaced while
    the trace runs.
    """
    original = EntropyModel.quantize

    def quantize(self: Any, inputs: Any, mode: str, means: Any = None) -> Any:
        traced = isinstance(inputs, fx.Proxy) and isinstance(self, EntropyModel)
        if not traced or mode != ("noise" if self.training else "dequantize"):
            return original(self, inputs, mode, means)
        name = tracer.path_of_module(self) + "_quantize"
        if name not in dict(tracer.root.named_modules()):
            parent, _, leaf = name.rpartition(".")
            tracer.root.get_submodule(parent).add_module(leaf, QuantizeLatent().eval())
        args = (inputs,) if means is None else (inputs, means)
        return tracer.create_proxy("call_module", name, args, {})

    EntropyModel.quantize = quantize
    try:
        yield
    finally:
        EntropyModel.quantize = original


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the graph of ``model``'s evaluation, on a copy of it that shares nothing with the original.

    Args:
        model: its forward takes images (B, 3, H, W) and returns a dict with ``x_hat`` and ``likelihoods``, as
            CompressAI's models do.

    Returns:
        a GraphModule in evaluation mode, on the device and in the dtype of ``model``. Its modules are those of
        the copy, which it carries (:func:`fmpq_fx.passes.annotation.graph_note`): the way back to the model's own
        class.

    Raises:
        FmpqError: the model cannot be traced, or returns something else, or a weight is computed from others.
    """
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise FmpqError("the model is quantized already; pass the float model that it was made from")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise FmpqError(
            f"a {type(model).__name__} only hands out copies of a model; pass what it wraps, model.module"
        )
    check_weights(model)  # before the copy, which torch refuses to make of some of them
    root = copy.deepcopy(model).eval()
    tracer = LicTracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise FmpqError(_untraceable(model, tracer, error)) from error
    gm = fx.GraphModule(root, graph, type(model).__name__)
    _check_output(gm)
    annotate_graph(gm, model=root)
    _warn_of_training(model, graph)
    graph.lint()
    return gm


def _warn_of_training(model: nn.Module, graph: fx.Graph) -> None:
    """Warn where the forward of ``model`` does something else in training: the graph will not."""
    tracer = LicTracer()
    try:
        other = tracer.trace(copy.deepcopy(model).train())
    except Exception:
        return  # what is done in training alone cannot be traced, and is not asked for
    for ours, theirs in zip_longest(graph.nodes, other.nodes):
        if ours is None or theirs is None or _operation(ours) != _operation(theirs):
            where = (ours or theirs).stack_trace or ""
            warnings.warn(
                f"the forward of {type(model).__name__} does something else in training than in evaluation, and the "
                f"graph does what it does in evaluation in both: {where}\nTo train the graph, decide on self.training "
                "inside an entropy model or a compressai.latent_codecs.LatentCodec, which are kept whole.",
                stacklevel=3,
            )
            return


def _operation(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)


def _untraceable(model: nn.Module, tracer: LicTracer, error: Exception) -> str:
    """Name the module and the line of the user's code at which the trace ended, and what can be done."""
    modules = [(name, cls) for name, cls in getattr(tracer, "module_stack", {}).values()]
    name, cls = modules[-1] if modules else ("", type(model))
    where = f"module {name!r} ({cls.__name__})" if name else f"the forward of {type(model).__name__}"
    fx_folder = fx.__file__.rpartition("/")[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename, fx_folder)]
    line = f"\n  {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return (
        f"{type(model).__name__} cannot be traced: {where} does something that torch.fx cannot record"
        f"{line}\n  {type(error).__name__}: {error}\n"
        "Control flow that depends on tensor values or arguments, assignment to items of a tensor and len() of a "
        "traced value cannot be recorded. Write that line with tensor operations (torch.where, chunk, a mask that "
        "multiplies), or move it into a subclass of compressai.latent_codecs.LatentCodec, which is kept whole "
        "and whose layers are quantized all the same."
    )


def _is_ours(filename: str, fx_folder: str) -> bool:
    return filename.startswith(fx_folder) or filename == __file__ or "/torch/nn/" in filename


def _check_output(gm: fx.GraphModule) -> None:
    """Refuse a model whose output is visibly not CompressAI's dict."""
    output = next(iter(reversed(gm.graph.nodes))).args[0]
    if isinstance(output, dict) and {"x_hat", "likelihoods"} <= output.keys():
        return
    if isinstance(output, fx.Node):  # computed by an opaque module; checked when it has run
        return
    what = (
        f"a dict with keys {sorted(map(str, output))}" if isinstance(output, dict) else type(output).__name__
    )
    raise FmpqError(
        f"the model returns {what}; the RD loss needs a dict with 'x_hat', the reconstruction, and "
        "'likelihoods', a dict of the likelihoods of all latents, as CompressAI's models return it"
    )


def check_trace(model: nn.Module, gm: fx.GraphModule, x: Tensor) -> None:
    """Run both on ``x`` in evaluation mode and compare bit for bit; ``model`` is not touched.

    Args:
        model: the model that was traced.
        gm: its graph.
        x: images (B, 3, H, W).

    Raises:
        FmpqError: the outputs differ, are not CompressAI's, or not of the size of ``x``, or the model cannot
            run on images of that size.
    """
    # A copy, since some layers write to their weights when they run, and the model is not ours.
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = output_of(twin, x.clone())  # some models also write to their input
        found = output_of(gm, x.clone())
    flat_expected = [expected["x_hat"], *expected["likelihoods"].values()]
    flat_found = [found["x_hat"], *found["likelihoods"].values()]
    if len(flat_expected) != len(flat_found) or not all(map(_identical, flat_expected, flat_found)):
        raise FmpqError(
            "the traced graph does not compute what the model computes. Either its forward decides something in "
            "Python that tracing froze (an if on a shape or an attribute, a value stored between calls): use a "
            "tensor operation instead. Or it writes in-place to a value that is also read under another name "
            "or through a view: compute a new tensor instead"
        )


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
