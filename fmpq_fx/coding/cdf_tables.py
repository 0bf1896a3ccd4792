"""Build the CDF tables of a model's entropy models, whether or not its class has an ``update()``."""

import inspect
from typing import Any

from compressai.entropy_models import EntropyModel, GaussianConditional
from compressai.models.base import get_scale_table
from torch import nn

from fmpq_fx.errors import FmpqError


def update_tables(model: nn.Module, *, missing: bool = False) -> None:
    """Build the tables of all entropy models in ``model``, in place, from their present weights.

    For CompressAI's own classes, their ``update()`` is called. Other classes may have no ``update()``, or one with
    other arguments: there each entropy model builds its own tables. A conditional one without a scale table gets
    CompressAI's. A model that neither codes nor has an ``update()`` keeps its tables.

    Args:
        model: any model.
        missing: whether to build only tables that do not exist yet.

    Raises:
        FmpqError: an entropy model of the user's own builds its tables in a way that is not known.
    """
    update = getattr(type(model), "update", None)
    if getattr(update, "__module__", "").partition(".")[0] == "compressai":
        model.update(force=not missing)  # type: ignore[operator]
    elif update is not None or hasattr(model, "compress"):
        for name, prior in model.named_modules():
            if isinstance(prior, EntropyModel) and not (missing and prior.offset.numel()):
                _update(name, prior)


def _update(name: str, prior: EntropyModel) -> None:
    if isinstance(prior, GaussianConditional) and not prior.scale_table.numel():
        prior.update_scale_table(get_scale_table(), force=True)
        return
    update: Any = getattr(prior, "update", None)
    for options in ({"force": True}, {}) if callable(update) else ():
        try:
            inspect.signature(update).bind(**options)
        except TypeError:
            continue
        update(**options)
        return
    raise FmpqError(
        f"the CDF tables of {name!r} cannot be built: a {type(prior).__name__} has no update() that can be called "
        "without arguments"
    )
