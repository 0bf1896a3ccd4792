"""Read fields from bytes that may be damaged."""

from fmpq_fx.errors import FmpqError


def counted(data: bytes, width: int) -> bytes:
    """Return ``data`` with its length before it, a big-endian number of ``width`` bytes."""
    return len(data).to_bytes(width, "big") + data


class ByteReader:
    """Takes bytes from the front of ``data``; raises FmpqError if there are too few."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        """Take ``count`` bytes."""
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise FmpqError(f"it is damaged: it ends {count - len(taken)} bytes early")
        self.position += count
        return taken

    def take_counted(self, width: int) -> bytes:
        """Take bytes that :func:`counted` wrote with this ``width``; return them without their length."""
        return self.take(int.from_bytes(self.take(width), "big"))

    def rest(self) -> bytes:
        """Take all that is left."""
        return self.take(len(self.data) - self.position)

    def end(self) -> None:
        """Check that nothing is left."""
        if self.position < len(self.data):
            raise FmpqError(f"it is damaged: it has {len(self.data) - self.position} bytes too many")
