"""Lower the entropy path of a model to exact integer arithmetic, so that what it codes decodes everywhere."""

import functools
from operator import attrgetter

import torch
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.exact import ExactLayer, ExactLeakyReLU
from fmpq_fx.exact.fixed_point import MOST, from_integers, to_integers
from fmpq_fx.passes.lower.entropy_path import EntropyPath
from fmpq_fx.passes.swap import replace_modules

_MOST_NAMED = 8  # obstacles in an error: where a block is repeated, so is what stands in it


def integerize(model: nn.Module, path: EntropyPath) -> nn.Module:
    """Put exact modules in the places of those of ``model`` on ``path``, in place, and return it.

    Loops that read a weight without calling its layer, as those of ``path.in_order``, are for the codec to replace.

    Args:
        model: a model of any class whose layers are quantized as a plan says. It is for coding from now on:
            nothing on the path has gradients.
        path: where they are (:func:`fmpq_fx.passes.lower.entropy_path.entropy_path`).

    Raises:
        FmpqError: something on the path cannot be computed exactly; ``model`` is then as it was.
    """
    if path.obstacles:
        more = len(path.obstacles) - _MOST_NAMED
        rest = f"; and {more} more" if more > 0 else ""
        raise FmpqError("; ".join(path.obstacles[:_MOST_NAMED]) + rest)
    device = next(model.parameters()).device
    exact: dict[nn.Module, nn.Module] = {}  # by the module replaced: it may have several names
    layer = functools.partial(ExactLayer, most=MOST // path.terms)
    for names, make in ((path.layers, layer), (path.activations, ExactLeakyReLU)):
        for name in names:
            old = model.get_submodule(name)
            try:
                exact[old] = make(old).to(device)  # type: ignore[arg-type]
            except FmpqError as error:
                raise FmpqError(f"{name!r} has no exact form: {error}") from error
    replace_modules(model, exact)
    # Medians as well, so that a symbol plus its median is a fixed-point number in every type.
    medians = [attrgetter(f"{name}.quantiles")(model)[:, :, 1] for name in path.priors]
    for values in (*medians, *(attrgetter(name)(model) for name in path.constants)):
        _round(values)
    return model


@torch.no_grad()
def _round(values: Tensor) -> None:
    """Make ``values`` fixed-point numbers, in place."""
    values.copy_(from_integers(to_integers(values), values.dtype))
