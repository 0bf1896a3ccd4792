"""Entropy coding of whole arrays: constriction's rANS coder, under frequencies that are integers.

The coder keeps a number of 64 bits, its state, and a stack of words of 32 bits. For a symbol of frequency f, with c the
sum of the frequencies of the symbols before it, both out of 2^24::

    encode, last symbol first     if state // 2^40 >= f: push state % 2^32, state = state // 2^32
                                  state = (state // f) * 2^24 + state % f + c
    decode, first symbol first    c <= state % 2^24 < c + f tells the symbol, then
                                  state = f * (state // 2^24) + state % 2^24 - c
                                  if state < 2^32: state = state * 2^32 + the word that is popped, if there is one

A string is the stack, then the state's low and its high word (no high word if it is 0), little-endian. The encoder
starts with the state 2^31. So the string is wrong if the decoder, after the last symbol, has another state or a word
left on its stack. A decoder with an empty stack goes on, and reads no other memory.

Frequencies are exact, although the library takes floats. It gives 1 of 2^24 to each of n symbols, and shares out
2^24 - n in proportion to the floats. Here these are f - 1, whose sum is 2^24 - n. Integers below 2^53 add up exactly,
so the factor of proportion is 1, and each symbol gets 1 + (f - 1), on every machine.
"""

from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from fmpq_fx.errors import FmpqError

PRECISION = 24
"""Frequencies add up to 2^PRECISION."""

Symbols = NDArray[np.int32]
Distribution = Any
"""The type that :func:`distribution` returns; the library has no types."""


class StringError(FmpqError):
    """A string is not one that the encoder makes under these distributions."""


_START = np.array([1 << 31], np.uint32)


def distribution(frequencies: NDArray[np.int64]) -> Distribution:
    """Return the distribution that gives the symbols 0, 1 … these ``frequencies``.

    Raises:
        ValueError: there are fewer than two, one is below 1, or their sum is not 2^PRECISION.
    """
    if len(frequencies) < 2 or frequencies.min() < 1 or frequencies.sum() != 1 << PRECISION:
        raise ValueError(f"{len(frequencies)} frequencies are not at least 1 with the sum 2^{PRECISION}")
    return constriction.stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def encode(runs: Sequence[tuple[Symbols, Distribution]]) -> bytes:
    """Return the string of all symbols of ``runs``, in order; a run is (symbols, their distribution)."""
    coder = constriction.stream.stack.AnsCoder(_START)
    for symbols, model in reversed(runs):
        coder.encode_reverse(symbols, model)
    string: bytes = coder.get_compressed().astype("<u4").tobytes()
    return string


def decode(string: bytes, runs: Sequence[tuple[int, Distribution]]) -> Symbols:
    """Return all symbols of ``string``; a run is (number of symbols, their distribution).

    Raises:
        StringError: the string is not the one that :func:`encode` makes of such symbols.
    """
    reader = StringReader(string)
    symbols = reader.read(runs)
    reader.end()
    return symbols


class StringReader:
    """Decodes a string in several steps, so that the first symbols can decide how the next are read.

    Raises:
        StringError: the encoder makes no such string.
    """

    def __init__(self, string: bytes):
        if len(string) % 4 or string[-4:] == bytes(4):
            raise StringError("a string is not one that the coder writes")
        self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(string, "<u4").astype(np.uint32))

    def read(self, runs: Sequence[tuple[int, Distribution]]) -> Symbols:
        """Return the next symbols, in runs of these lengths and distributions."""
        parts = [self._coder.decode(model, count) for count, model in runs]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def end(self) -> None:
        """Check that the string ends here.

        Raises:
            StringError: the string is not the one that :func:`encode` makes of the symbols that were read.
        """
        if not np.array_equal(self._coder.get_compressed(), _START):
            raise StringError("a string does not end with its last symbol")
