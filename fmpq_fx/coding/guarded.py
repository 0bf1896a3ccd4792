"""compress() and decompress() of a codec with CompressAI's coder guarded, and in the codec's own float type."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressai.entropy_models import EntropyModel
from torch import nn

from fmpq_fx.coding.string_coder import CheckedCoder


def guard(codec: nn.Module) -> nn.Module:
    """Guard ``compress()`` and ``decompress()`` of ``codec`` where it has them, in place, and return it.

    CompressAI's way of coding an autoregressive model does not go through its entropy models' coders: it is guarded
    where exact loops take its place.
    """
    for name in ("compress", "decompress"):
        if callable(getattr(type(codec), name, None)):
            setattr(codec, name, _Guarded(codec, name))
    return codec


class _Guarded:
    """One of the two methods: an object that knows its model, so that a copy of it, or a pickled one, has its own.

    The coders are put in their places at every call, since the entropy models make new ones when they are copied.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for prior in self.model.modules():
            if isinstance(prior, EntropyModel) and prior.entropy_coder.name == CheckedCoder.name:
                prior.entropy_coder = CheckedCoder()
        with default_dtype(next(self.model.parameters()).dtype):
            return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new tensors are ``dtype``: some decoders of CompressAI make theirs of the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
