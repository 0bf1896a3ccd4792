"""CompressAI's entropy coder with guards: what makes it loop for ever is an error, what makes it misread a warning.

Its encoder does not end on symbols far outside of their tables, which a NaN among the latents is enough for. Its
decoder does not look where a string ends. It takes symbols one after the other from a state, an integer of 64 bits,
which is 2^31 after the last one; so a string that was damaged betrays itself, almost surely, by another.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from compressai.ans import BufferedRansEncoder, RansDecoder
from torch import Tensor

from fmpq_fx.errors import FmpqError

Tables = tuple[Any, Any, Any]
"""CDFs, their lengths and their offsets, as lists."""

MOST_SYMBOL = 2**26
"""The largest magnitude of a symbol; with its table's offset, CompressAI's encoder ends below 2^27."""

_FILL = b"\1"
# What the decoder, with 2^31 left and only filling to come, takes from the state: 16 zeros, and then those 16 bits that
# the filling has, again and again. Both are symbols of probability 2^-16 here, so that each takes just these bits off.
_FILLING = int.from_bytes(2 * _FILL, "little")
_END = [0, 2, 2, 2, 2, 2]
_END_TABLES = ([[0, 1, _FILLING, _FILLING + 1, 2**16 - 1, 2**16]], [6], [0])


def trimmed_tables(cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> Tables:
    """Return the tables of an entropy model without the padding of its CDFs: most rows are short."""
    ends = lengths.flatten().tolist()
    rows = [row[:end] for row, end in zip(cdfs.tolist(), ends, strict=True)]
    return rows, ends, offsets.flatten().tolist()


def padded(string: bytes, symbols: int) -> bytes:
    """Return ``string`` with filling behind it, so much that CompressAI's decoder stays inside it, whatever it is.

    It reads at most a word of 4 bytes for a symbol, and for one outside of its table so many more as the 4-bit
    numbers that come first sum to: at most 30 words per byte of the string. They end with one below 15, as those of the
    filling are. It is no zeros: a decoder in the middle of a string that is cut could take them for its end.
    """
    string = string.rstrip(_FILL)  # that of an earlier call as well
    return string + _FILL * (4 * 30 * len(string) + 4 * symbols + 256)


def encode(symbols: Sequence[int], indexes: Sequence[int], tables: Tables) -> bytes:
    """Return the string of ``symbols``, each coded with the CDF of its index.

    Raises:
        FmpqError: a symbol is too large to be one.
    """
    most = max(-min(symbols, default=0), max(symbols, default=0))
    if most > MOST_SYMBOL:
        raise FmpqError(
            f"a latent is {most} steps away from its mean, and at most {MOST_SYMBOL} are coded: the image or the "
            "weights of the model hold NaN, infinite or absurdly large numbers"
        )
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, *tables)
    string: bytes = encoder.flush()
    return string


class StringReader:
    """Decodes ``symbols`` symbols from ``string``, in as many calls as it takes."""

    def __init__(self, string: bytes, symbols: int):
        self._decoder = RansDecoder()
        # As much again, thrice, for 4-bit numbers that the decoder's state still holds a part of behind the string.
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


class CheckedCoder:
    """Takes the place of the ``entropy_coder`` of CompressAI's entropy models."""

    name = "ans"  # what they pickle of it, and make one of their own from in a copy

    def encode_with_indexes(self, symbols: list[int], indexes: list[int], *tables: Any) -> bytes:
        """Return :func:`encode` of the same."""
        return encode(symbols, indexes, tables)

    def decode_with_indexes(self, string: bytes, indexes: list[int], *tables: Any) -> list[int]:
        """Return the symbols of ``string``, one per index."""
        reader = StringReader(string, len(indexes))
        symbols = reader.read(indexes, tables)
        reader.end()
        return symbols
