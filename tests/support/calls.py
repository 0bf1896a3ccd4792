"""Counts the calls of layers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def counted_calls(layer: nn.Module) -> Iterator[list[None]]:
    """Collect an item for each call of ``layer``."""
    calls: list[None] = []
    handle = layer.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()
