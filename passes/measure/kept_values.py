"""Node values that are kept in memory, within a budget of bytes that several runs of a graph share."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx

from fmpq_fx.memory import spelled


class Budget:
    """The bytes of node values that may be kept, and the stores that keep them.

    Args:
        limit: bytes that all stores may hold together.
        shares: the number of stores that keep values ahead of need; each does so up to an equal share.
    """

    def __init__(self, limit: int, shares: int = 1):
        self.limit = limit
        self.share = limit // max(1, shares)
        self.stores: list[KeptValues] = []

    @property
    def held(self) -> int:
        """Bytes that are kept now."""
        return sum(store.held for store in self.stores)

    def check(self, needed: int, what: str) -> None:
        """Refuse a budget below the ``needed`` bytes.

        Raises:
            ValueError: the message says how many bytes ``what`` needs.
        """
        if needed > self.limit:
            raise ValueError(
                f"memory={self.limit} ({spelled(self.limit)}) is too little: {what} takes {needed} bytes; pass "
                f"memory={needed} ({spelled(needed)}) or more, or smaller images"
            )


class KeptValues:
    """The values of some nodes of one run. Others can be computed again from these."""

    def __init__(self, budget: Budget):
        self.values: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, int] = {}  # bytes
        self.held = 0  # bytes
        self._budget = budget
        budget.stores.append(self)

    def offer(self, node: fx.Node, value: Any) -> None:
        """Keep ``value`` if this store's share has room, or if dropping larger values makes room."""
        size = value_bytes(value)
        others = self._budget.held - self.held
        room = min(self._budget.share, self._budget.limit - others)
        while self.held + size > room:
            largest = max(self.sizes, key=self.sizes.__getitem__, default=None)
            if largest is None or self.sizes[largest] <= size:
                return
            self.drop(largest)
        self._put(node, value, size)

    def demand(self, values: dict[fx.Node, Any], what: str) -> None:
        """Keep ``values``, and drop others to make room, here first, then in other stores.

        Raises:
            ValueError: they exceed the budget; the message calls them ``what``.
        """
        self._budget.check(sum(map(value_bytes, values.values())), what)
        for node, value in values.items():
            size = value_bytes(value)
            self._make_room(size, needed=values)
            for store in self._budget.stores:
                if store is not self:
                    store._make_room(size, needed=())
            self._put(node, value, size)

    def drop(self, node: fx.Node) -> None:
        """Forget the value of ``node`` if it is kept."""
        if self.values.pop(node, None) is not None:
            self.held -= self.sizes.pop(node)

    def clear(self) -> None:
        """Forget all values."""
        self.values.clear()
        self.sizes.clear()
        self.held = 0

    def _put(self, node: fx.Node, value: Any, size: int) -> None:
        self.drop(node)
        self.values[node], self.sizes[node] = value, size
        self.held += size

    def _make_room(self, size: int, needed: Collection[fx.Node]) -> None:
        """Drop values, the largest first, until ``size`` more bytes fit or only ``needed`` ones are left."""
        for node in sorted(self.sizes, key=self.sizes.__getitem__, reverse=True):
            if self._budget.held + size <= self._budget.limit:
                return
            if node not in needed:
                self.drop(node)


def value_bytes(value: Any) -> int:
    """Return how many bytes the tensors in a node's value keep in memory; a view counts as its whole storage."""
    storages: dict[int, int] = {}
    fx.node.map_aggregate(value, lambda leaf: storages.update(_storage(leaf)))
    return sum(storages.values())


def _storage(leaf: Any) -> dict[int, int]:
    if not isinstance(leaf, Tensor):
        return {}
    storage = leaf.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}
