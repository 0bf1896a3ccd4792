"""Build the CDF tables of a model's entropy models, whatever its class says about that."""

import inspect
from typing import Any

from compressai.entropy_models import EntropyModel, GaussianConditional
from compressai.models.base import get_scale_table
from torch import nn

from fmpq_fx.errors import FmpqError


def update_tables(model: nn.Module, *, missing: bool = False) -> None:
    """Build the tables of all entropy models in ``model``, in place, from their weights as they are now.

    What CompressAI's own classes do in ``update()`` is what they do here. Other classes have no ``update()``, or one
    with other arguments: for them each entropy model builds its own tables, a conditional one from its scale table,
    which is CompressAI's where it has none yet. A model that neither codes nor has an ``update()`` keeps what it has.

    Args:
        model: any.
        missing: only build the tables that are not there yet.

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
