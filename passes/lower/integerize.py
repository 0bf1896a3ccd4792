"""Lower the entropy path of a model to exact integer arithmetic, so that its bitstreams decode everywhere."""

import functools
from operator import attrgetter

import torch
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.exact import ExactLayer, ExactLeakyReLU
from fmpq_fx.exact.fixed_point import MOST, from_integers, to_integers
from fmpq_fx.passes.lower.entropy_path import EntropyPath
from fmpq_fx.passes.swap import replace_modules

_MOST_NAMED = 8  # obstacles in an error; repeated blocks repeat their obstacles


def integerize(model: nn.Module, path: EntropyPath) -> nn.Module:
    """Replace the modules of ``model`` on ``path`` by exact ones, in place, and return ``model``.

    Coding loops that read a weight without calling its layer (``path.in_order``) must be replaced by the codec.

    Args:
        model: a model of any class whose layers are quantized as a plan says. From now on it can only code: nothing
            on the path has gradients.
        path: its entropy path (:func:`fmpq_fx.passes.lower.entropy_path.entropy_path`).

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
    # Medians too, so that a symbol plus its median is a fixed-point number in every type of float.
    medians = [attrgetter(f"{name}.quantiles")(model)[:, :, 1] for name in path.priors]
    for values in (*medians, *(attrgetter(name)(model) for name in path.constants)):
        _round(values)
    return model


@torch.no_grad()
def _round(values: Tensor) -> None:
    """Make ``values`` fixed-point numbers, in place."""
    values.copy_(from_integers(to_integers(values), values.dtype))
