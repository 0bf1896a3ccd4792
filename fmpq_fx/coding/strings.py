"""The strings that ``compress()`` returns: bytes, nested in lists and dicts in a different way by each class.

CompressAI's models return a list for each latent, with a string for each image. Other codecs return bare bytes, or a
list for each group of channels. The form of a nest is the nest with None in the place of each string.
"""

from collections.abc import Iterator
from typing import Any

from fmpq_fx.errors import FmpqError


def flat(strings: Any) -> list[bytes]:
    """Return all strings of a nest, in order.

    Raises:
        FmpqError: a value in it is neither bytes nor a list, tuple or dict.
    """
    if isinstance(strings, bytes):
        return [strings]
    if isinstance(strings, list | tuple | dict):
        parts = strings.values() if isinstance(strings, dict) else strings
        return [string for part in parts for string in flat(part)]
    raise FmpqError(
        f"among the strings that compress() returned is a value of type {type(strings).__name__}; expected bytes, in "
        "lists, tuples or dicts"
    )


def form_of(strings: Any) -> Any:
    """Return the form of a nest, for JSON: None for a string, and lists and dicts of forms.

    Raises:
        FmpqError: a key of a dict is no text, which JSON would make another key of.
    """
    if isinstance(strings, bytes):
        return None
    if isinstance(strings, dict):
        if other := [key for key in strings if not isinstance(key, str)]:
            raise FmpqError(
                f"the strings that compress() returned are in a dict with the key {other[0]!r}; expected text as keys"
            )
        return {key: form_of(part) for key, part in strings.items()}
    return [form_of(part) for part in strings]


def in_form(form: Any, strings: Iterator[bytes]) -> Any:
    """Return the nest of this ``form``, with the next of ``strings`` for each None in it.

    Raises:
        FmpqError: the form has other values.
    """
    if form is None:
        return next(strings)
    if isinstance(form, dict):
        return {key: in_form(part, strings) for key, part in form.items()}
    if isinstance(form, list):
        return [in_form(part, strings) for part in form]
    raise FmpqError(f"it is damaged: its strings have the impossible form {str(form)[:80]}")
