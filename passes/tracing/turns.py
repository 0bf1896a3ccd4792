"""Threads that trace take turns, because tracing exchanges methods of torch's for the whole process meanwhile.

Threads that run models do not wait: what is exchanged does for them what it did before.
"""

import threading

TRACING = threading.RLock()
"""Is held while methods are exchanged: another exchange in between would be undone in the wrong order."""


class Thread:
    """The thread that made it."""

    def __init__(self) -> None:
        self._identity = threading.get_ident()

    def runs(self) -> bool:
        """Say whether it is the one that asks."""
        return threading.get_ident() == self._identity
