"""Let threads that trace take turns, because tracing exchanges methods of torch for the whole process.

Threads that run models do not wait: in them the exchanged methods do what they did before.
"""

import threading

TRACING = threading.RLock()
"""The lock held while methods are exchanged; overlapping exchanges would be undone in the wrong order."""


class Thread:
    """The thread that made this object."""

    def __init__(self) -> None:
        self._identity = threading.get_ident()

    def is_current(self) -> bool:
        """Say whether the calling thread is this one."""
        return threading.get_ident() == self._identity
