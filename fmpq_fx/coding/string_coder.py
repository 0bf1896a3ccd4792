"""CompressAI's entropy coder with checks: an error where it would not end, a warning where it misreads.

Its encoder does not end on symbols far outside of their tables; one NaN among the latents is enough. Its decoder does
not check where a string ends. It reads a string like this (rANS)::

    string  │ word │ word │ word │ word │ ...        words of 4 bytes, from the left
             └─────┬─────┘    │
    state        64 bits ◄────┘

    1. The lowest 16 bits of the state select the next symbol.
    2. The state becomes smaller by as many bits as this symbol costs.
    3. If the state is now below 2^31, it takes in the next word: state = state * 2^32 + word.

The encoder goes the other way and starts with the state 2^31. So the decoder has this state after the last symbol, and
almost surely another one after a damaged string. The state is hidden, but the next symbols that it decodes reveal it.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyModel
from torch import Tensor

from fmpq_fx.errors import FmpqError

Tables = tuple[Any, Any, Any]
"""CDFs, their lengths and their offsets, as lists."""

MOST_SYMBOL = 2**26
"""The largest magnitude of a symbol; with its table's offset, CompressAI's encoder ends below 2^27."""

LEAST_SYMBOLS = 4
"""With fewer, CompressAI's encoder writes before its buffer, which has a word per symbol: the state takes two."""

_FILL = b"\1"
# Behind a string comes filling, words of 0x01010101. In the table _END_TABLES, the lowest bits 0 and 0x0101 are symbols
# of 16 bits each. A decoder with the state 2^31 reads them like this; with another state it reads something else:
#
#     state                 lowest 16 bits    symbol    state then       takes in a word
#     2^31                  0                 0         2^15             yes
#     2^47 + 0x01010101     0x0101            2         2^31 + 0x0101    no
#     2^31 + 0x0101         0x0101            2         2^15             yes, and so on
_FILLING = int.from_bytes(2 * _FILL, "little")
_END = [0, 2, 2, 2, 2, 2]
_END_TABLES = ([[0, 1, _FILLING, _FILLING + 1, 2**16 - 1, 2**16]], [6], [0])


def trimmed_tables(cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> Tables:
    """Return the tables of an entropy model without the padding of its CDFs: most rows are short."""
    ends = lengths.flatten().tolist()
    rows = [row[:end] for row, end in zip(cdfs.tolist(), ends, strict=True)]
    return rows, ends, offsets.flatten().tolist()


class _Padded(bytes):
    """A string with filling behind it; ``string`` is the string alone."""

    string: bytes


def padded(string: bytes, symbols: int) -> bytes:
    """Return ``string`` with so much filling behind it that CompressAI's decoder never reads beyond, even if damaged.

    For a symbol of its table the decoder reads at most one word of 4 bytes. A symbol outside of its table is written in
    4-bit numbers, the first of which count the others: each 15 adds to the count and is followed by another number. So
    a damaged string may demand up to 30 words for each of its bytes, but no more, since the filling has no 15. It has
    no zeros either: a decoder in the middle of a cut string could take them for the end.
    """
    end = string.rstrip(_FILL)  # also without the filling of an earlier call
    filled = _Padded(end.ljust(len(end) + 4 * 30 * len(end) + 4 * symbols + 256, _FILL))
    filled.string = unpadded(string)
    return filled


def unpadded(string: bytes) -> bytes:
    """Return ``string`` as it was before :func:`padded`."""
    return string.string if isinstance(string, _Padded) else string


def encode(symbols: Sequence[int], indexes: Sequence[int], tables: Tables) -> bytes:
    """Return the string of ``symbols``, each coded with the CDF of its index.

    Raises:
        FmpqError: a symbol is too large to be coded, or there are only 1 to 3 symbols.
    """
    if 0 < len(symbols) < LEAST_SYMBOLS:
        raise FmpqError(
            f"a string of {len(symbols)} latents cannot be made: CompressAI's coder takes {LEAST_SYMBOLS} or more; "
            "code a larger image, or several channels in one string"
        )
    most = max(-min(symbols, default=0), max(symbols, default=0))
    if most > MOST_SYMBOL:
        raise too_far(most)
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, *tables)
    string: bytes = encoder.flush()
    return string


def too_far(most: int) -> FmpqError:
    """Return the error for a latent that is ``most`` steps away from its mean."""
    return FmpqError(
        f"a latent is {most} steps away from its mean, and at most {MOST_SYMBOL} are coded: the image or the "
        "weights of the model hold NaN, infinite or absurdly large numbers"
    )


class StringReader:
    """Decodes ``symbols`` symbols from ``string``, in any number of calls."""

    def __init__(self, string: bytes, symbols: int):
        self._decoder = RansDecoder()
        # Four times the symbols, since at the end of the string the state may still hold some 4-bit numbers.
        self._decoder.set_stream(padded(string, 4 * symbols))

    def read(self, indexes: Sequence[int], tables: Tables) -> list[int]:
        """Return the next symbols, one per index."""
        symbols: list[int] = self._decoder.decode_stream(indexes, *tables)
        return symbols

    def end(self) -> None:
        """Warn unless the string ends here."""
        if self.read([0] * len(_END), _END_TABLES) != _END:
            warnings.warn(
                "a string does not end with its last symbol: it was cut or altered, or encoded with another model or "
                "by other arithmetic, and what is decoded from it is damaged",
                stacklevel=2,
            )


def unnoted(symbols: Sequence[int], coded: bool) -> None:
    """Note nothing; the ``note`` of :class:`CheckedCoder` without a chooser."""


class CheckedModel(EntropyModel):
    """An entropy model whose coder is checked; a base class beside the model's own class.

    Attributes:
        note: see :class:`CheckedCoder`.
    """

    note: Callable[[Any, bool], None]

    @property
    def entropy_coder(self) -> "CheckedCoder":
        """The coder that replaces CompressAI's."""
        return CheckedCoder(self.note)


class CheckedCoder:
    """Replaces the ``entropy_coder`` of CompressAI's entropy models.

    Args:
        note: is called with the symbols of each string, and True if they were encoded, False if decoded.
    """

    name = "ans"  # name of CompressAI's coder of the same strings; entropy models are pickled with this name

    def __init__(self, note: Callable[[Sequence[int], bool], None]):
        self._note = note

    def encode_with_indexes(self, symbols: list[int], indexes: list[int], *tables: Any) -> bytes:
        """Return the string of ``symbols``; see :func:`encode`."""
        string = encode(symbols, indexes, tables)
        self._note(symbols, True)
        return string

    def decode_with_indexes(self, string: bytes, indexes: list[int], *tables: Any) -> list[int]:
        """Return the symbols of ``string``, one per index."""
        reader = StringReader(string, len(indexes))
        symbols = reader.read(indexes, tables)
        reader.end()
        self._note(symbols, False)
        return symbols
