"""Trace a learned image compression model into a torch.fx graph.

The model runs on an example, and every operation is recorded beside its value. Python sees real tensors and sizes, so
that the forward may loop, ask and assert. Decisions on sizes or values become guards, which the graph checks whenever
it runs. Layers that can be quantized, entropy models and latent codecs stay whole; all other modules, a user's own
included, are traced into.
"""

import warnings

from torch import Tensor, fx, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.annotation import annotate_graph
from fmpq_fx.passes.sites import check_weights
from fmpq_fx.passes.tracing.examples import synthetic
from fmpq_fx.passes.tracing.forward import Recorded, record
from fmpq_fx.passes.tracing.module import TracedModule
from fmpq_fx.passes.tracing.wrappers import copied, unwrapped


def trace(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """Return the graph of ``model``'s evaluation, on a copy of it that shares nothing with the original.

    No operation of the graph changes its inputs. If the forward does something else in training, the result has a
    second graph for that.

    Args:
        model: its forward takes images (B, C, H, W) and returns a dict with ``x_hat`` and ``likelihoods``, as
            CompressAI's models do. Further arguments keep their defaults.
        example: images (B, C, H, W); the first is used. None makes a synthetic one, of 256 x 256 pixels if the model
            can run on that. Graphs serve images of other sizes as well, unless a guard refuses them.

    Returns:
        a GraphModule in evaluation mode, on the device and in the dtype of ``model``. Its modules are those of
        the copy, which it carries (:func:`fmpq_fx.passes.annotation.graph_note`): the way back to the model's own
        class.

    Raises:
        FmpqError: the model cannot be traced, cannot run on the example, or returns something else; a weight is
            computed from others.
    """
    model = unwrapped(model)
    check_weights(model)  # before the copy, which torch refuses to make of some of them
    root = copied(model)
    image = synthetic(root) if example is None else example[:1]
    evaluation = record(root, image)
    training = _in_training(root, image, evaluation)
    for module in root.modules():  # also those inside of others that stay whole: none may write to its input
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    held = evaluation.held(root) | (training.held(root) if training else {})
    gm = TracedModule(held, evaluation.graph, training.graph if training else None, type(root).__name__)
    annotate_graph(gm, model=root, frozen=evaluation.frozen)
    return gm.eval()


def _in_training(root: nn.Module, image: Tensor, evaluation: Recorded) -> Recorded | None:
    """Record the forward of ``root`` in training; None if it does the same as in evaluation."""
    if not evaluation.asks_mode:
        return None
    try:
        training = record(root, image, training=True)
        if training.same(evaluation):
            return None
        return (
            record(root, image, training=True, constants="training_constant")
            if training.constants
            else training
        )
    except FmpqError as error:
        warnings.warn(
            f"the graph does in training what it does in evaluation, because the forward of {type(root).__name__} "
            f"cannot be traced in training: {error}",
            stacklevel=3,
        )
        return None
