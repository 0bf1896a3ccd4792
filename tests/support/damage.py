"""Strings with damage."""

from hypothesis import assume
from hypothesis import strategies as st


def damaged(string: bytes, data: st.DataObject) -> bytes:
    """Return another string: ``string`` cut or with another end, and up to three bytes changed."""
    other = bytearray(string)
    other[data.draw(st.integers(0, len(other))) :] = data.draw(st.binary(max_size=9))
    for place in data.draw(st.lists(st.integers(0, len(other) - 1), max_size=3)) if other else []:
        other[place] = data.draw(st.integers(0, 255))
    assume(bytes(other) != string)
    return bytes(other)
