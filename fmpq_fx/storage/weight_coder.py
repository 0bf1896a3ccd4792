"""Lossless entropy coding of integer weights, by CompressAI's range coder under a model that fits in few bytes.

The spread of a weight is roughly a product of three factors: of its output channel, of its input channel and of its
place in the kernel. So every channel and place gets a factor (a byte, in eighths of an octave), and weights are sorted
into classes by the sum of their three. Each class has a distribution of its own: a discretized logistic one out of a
bank (one byte), or counted frequencies (one byte per symbol) where these are smaller. Classes of several widths, and a
single class, are tried; the smallest form is taken, side information included.

The coded form, in this order:

====================  ============================================================================================
1 byte                ``step``, the width of a class in eighths of an octave; 0 is a single class
(out + in + places)   factors, int8, if ``step`` is not 0
per class             one byte: a number in the bank, or 255 and then one byte per symbol
ceil(size * raw / 8)  the ``raw`` lowest bits of every integer, where they have more than 10
the rest              the range coder's string, of what is above those
====================  ============================================================================================

The range coder (rANS) keeps one number of 64 bits, its state. Of a symbol of frequency f, with c the frequencies of
the symbols before it in the table added up, both out of 2^16::

    encode, last symbol first     state = (state // f) * 2^16 + state % f + c
    decode, first symbol first    c <= state % 2^16 < c + f says which symbol it is, then
                                  state = f * (state // 2^16) + state % 2^16 - c

The state is at least 2^31. Before it would reach 2^63, the encoder puts its lowest 32 bits away as a word; when it
falls below 2^31, the decoder takes the next word in. The string is the last state, then the words, the last one first.

Decoding is the same on every machine: frequencies come from integers and from additions, multiplications and
divisions of float64 in a fixed order, which IEEE 754 rounds alike everywhere. What the encoder chooses rests on
logarithms, which may differ in the last bit; any choice decodes.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from compressai.ans import RansDecoder, RansEncoder
from numpy.typing import NDArray

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.byte_reader import ByteReader

Integers = NDArray[np.int64]

PRECISION = 16  # bits of CompressAI's cumulative frequencies
MODELED_BITS = (
    10  # highest bits of an integer, which get a model; a frequency for each symbol leaves room for no more
)
STEPS = (2, 4, 8)  # widths of a class that are tried, eighths of an octave
FACTOR = 8.0  # steps of a factor in an octave
COUNTED = 255  # stands for a table of frequencies where a number in the bank is expected
LEAST = 4  # symbols that a string has at least; with fewer, CompressAI's coder writes outside its buffer
_LEAST_STATE = 1 << 31  # of the range coder, between two symbols
_FITS = 3  # rounds of fitting the factors; the third changes little


@dataclass(frozen=True)
class Coded:
    """Integer weights in their coded form."""

    side: bytes  # what the model of the symbols takes
    raw: bytes  # the lowest bits of integers of many bits
    symbols: bytes  # the range coder's string

    def __bytes__(self) -> bytes:
        return self.side + self.raw + self.symbols


def encode(weights: Integers, low: int, high: int) -> Coded:
    """Return the coded form of ``weights``.

    Args:
        weights: integers in [low, high], (out, in, places): the output channel, the input channel, and all
            other dimensions of the weight tensor flattened.
        low: the least integer that the bits of the weights allow.
        high: the largest.
    """
    raw, symbols = _split(weights, low, high)
    size = (high - low >> raw) + 1
    candidates = [_single(symbols, size), *(_by_factors(symbols, size, step) for step in STEPS)]
    model = min(candidates, key=lambda candidate: candidate.bits)
    # The coder writes its state, two words, into a buffer with a word for each symbol: a few are repeated.
    values, classes = symbols.ravel().tolist(), model.classes.ravel().tolist()
    repeated = max(1, -(-LEAST // len(values)))
    string = RansEncoder().encode_with_indexes(
        values * repeated, classes * repeated, *_cumulative(model.frequencies)
    )
    return Coded(model.side, _packed(weights - low, raw), string)


def coded_bytes(weights: Integers, low: int, high: int) -> int:
    """Return how many bytes :func:`encode` takes for ``weights``."""
    return len(bytes(encode(weights, low, high)))


def decode(data: bytes, shape: tuple[int, ...], low: int, high: int) -> Integers:
    """Return the weights that :func:`encode` was given, (out, in, places).

    Raises:
        FmpqError: ``data`` is not the coded form of weights of that shape and range.
    """
    raw, reader = _raw_bits(low, high), ByteReader(data)
    classes, frequencies = _read_model(reader, shape, (high - low >> raw) + 1)
    count = classes.size
    lowest = _unpacked(reader.take(-(-count * raw // 8)), count, raw)
    string = reader.rest()
    if len(string) < 8 or int.from_bytes(string[:8], sys.byteorder) < _LEAST_STATE:
        raise FmpqError("the string of a layer is not one that the coder writes")
    # The coder does not look where its string ends. It takes in at most a word per symbol, because these tables have
    # no escape. So a word of zeros per symbol keeps it inside the string, whatever the string is.
    string += bytes(4 * count)
    symbols = RansDecoder().decode_with_indexes(string, classes.ravel().tolist(), *_cumulative(frequencies))
    weights = (np.array(symbols, np.int64) << raw) + lowest + low
    if weights.max() > high:
        raise FmpqError(f"a weight of {weights.max()}, above {high}")
    return weights.reshape(shape)


def side_bytes(data: bytes, shape: tuple[int, ...], low: int, high: int) -> int:
    """Return how many of the bytes that :func:`decode` takes tell it the model of the symbols."""
    reader = ByteReader(data)
    _read_model(reader, shape, (high - low >> _raw_bits(low, high)) + 1)
    return reader.position


@dataclass(frozen=True)
class _Model:
    """A way to code an array of symbols."""

    classes: Integers  # the class of every symbol
    frequencies: list[Integers]  # of the symbols in each class, summing to 2^PRECISION
    side: bytes  # what tells a decoder all of this
    bits: float  # that the symbols and `side` take


def _single(symbols: Integers, size: int) -> _Model:
    return _fitted(symbols, np.zeros_like(symbols), size, bytes(1))


def _by_factors(symbols: Integers, size: int, step: int) -> _Model:
    factors = _factors(symbols - symbols.mean().round())
    header = bytes([step]) + b"".join(f.tobytes() for f in factors)
    return _fitted(symbols, _classes(factors, step), size, header)


def _fitted(symbols: Integers, classes: Integers, size: int, header: bytes) -> _Model:
    """Give each class the distribution that codes its symbols in the fewest bits."""
    number = int(classes.max()) + 1
    counts = np.bincount((classes * size + symbols).ravel(), minlength=number * size).reshape(number, size)
    bank = _bank(size)
    banked = -counts @ np.log2(bank / 2**PRECISION).T
    choices, frequencies, bits = [], [], 8.0 * len(header)
    for row, costs in zip(counts, banked, strict=True):
        best = int(costs.argmin())
        levels = _levels(row)
        own = _frequencies(_from_levels(levels))
        counted = 8 * size - row @ np.log2(own / 2**PRECISION)
        smaller = counted < costs[best]
        choices.append(bytes([COUNTED]) + levels.tobytes() if smaller else bytes([best]))
        frequencies.append(own if smaller else bank[best])
        bits += 8 + min(counted, costs[best])
    return _Model(classes, frequencies, header + b"".join(choices), bits)


def _factors(deviations: NDArray[np.float64]) -> list[NDArray[np.int8]]:
    """Return log2 of factors, one per index of each dimension, whose products fit the mean |deviation|."""
    spread = np.abs(deviations).astype(np.float64)
    spread += 0.05 * spread.mean() + 1e-6
    logs = [np.zeros(count) for count in spread.shape]
    fit = np.ones_like(spread)
    for _ in range(_FITS):
        for axis in range(spread.ndim):
            others = tuple(d for d in range(spread.ndim) if d != axis)
            ratio = spread.sum(others) / fit.sum(others)
            logs[axis] += np.log2(ratio)
            fit *= np.expand_dims(ratio, others)
    return [np.clip(np.rint(FACTOR * log), -128, 127).astype(np.int8) for log in logs]


def _classes(factors: list[NDArray[np.int8]], step: int) -> Integers:
    """Return the class of every weight: the number of its step among the steps that sums of factors lie on."""
    outputs, inputs, places = (f.astype(np.int64) for f in factors)
    total = outputs[:, None, None] + inputs[:, None] + places
    level = total // step - (total // step).min()
    occurs = np.bincount(level.ravel()) > 0
    classes: Integers = (np.cumsum(occurs) - 1)[level]
    return classes


@lru_cache
def _bank(size: int) -> Integers:
    """Return frequencies of logistic distributions about the middle of ``size`` symbols, one in a row.

    Their scale grows by about a quarter from row to row. With r = exp(-1 / (2 s)), the probability of a distance
    of at most k + 1/2 from the middle follows from 1 / (1 + r^(2k + 1)). A middle at the first symbol, for
    integers that are never negative, comes as a second half of the bank.
    """
    rows = []
    for center in (size // 2, 0):
        scale = 1
        while scale < 8 * size:
            powers = np.multiply.accumulate(np.full(2 * size, scale / (scale + 4)))
            inside = 1 / (1 + powers[::2])
            weight = np.concatenate([[2 * inside[0] - 1], np.diff(inside)])
            rows.append(_frequencies(weight[np.abs(np.arange(size) - center)]))
            scale += max(1, scale // 4)
    return np.stack(rows)


def _levels(counts: Integers) -> NDArray[np.uint8]:
    """Return counts as logarithms, in eighths of an octave below the largest; 255 is never."""
    with np.errstate(divide="ignore"):
        below = FACTOR * np.log2(max(1, counts.max()) / counts)
    return np.where(counts > 0, np.rint(np.minimum(below, 254)), 255).astype(np.uint8)


def _from_levels(levels: NDArray[np.uint8]) -> NDArray[np.float64]:
    eighths = np.array([256, 235, 215, 197, 181, 166, 152, 140], np.float64)  # 256 * 2^(-i / 8)
    weights = eighths[levels % 8] * np.ldexp(1.0, -(levels // 8).astype(np.int64))
    return np.where(levels < 255, weights, 0.0)


def _frequencies(weights: NDArray[np.float64]) -> Integers:
    """Return integers, at least 1 each, in proportion to ``weights`` and with the sum 2^PRECISION."""
    total = np.add.accumulate(weights)[-1]  # in this order, unlike sum()
    if not total > 0:
        raise FmpqError("a class in which no symbol ever occurs")
    frequencies = 1 + np.floor(weights / total * (2**PRECISION - len(weights))).astype(np.int64)
    frequencies[weights.argmax()] += 2**PRECISION - frequencies.sum()
    result: Integers = frequencies
    return result


def _cumulative(frequencies: list[Integers]) -> tuple[list[list[int]], list[int], list[int]]:
    """Return tables as CompressAI's coder takes them: cumulative, their lengths, and the first symbols.

    The last of its symbols is the escape to what is not in the table: it has no frequency here.
    """
    tables = [[0, *np.add.accumulate(f).tolist(), 2**PRECISION] for f in frequencies]
    return tables, [len(table) for table in tables], [0] * len(tables)


def _read_model(reader: ByteReader, shape: tuple[int, ...], size: int) -> tuple[Integers, list[Integers]]:
    """Return the class of every symbol, and the frequencies of each class."""
    step = reader.take(1)[0]
    if step not in (0, *STEPS):
        raise FmpqError(f"a class is {step} eighths of an octave wide")
    classes = np.zeros(shape, np.int64)
    if step:
        classes = _classes([np.frombuffer(reader.take(count), np.int8) for count in shape], step)
    return classes, [_read_frequencies(reader, size) for _ in range(int(classes.max()) + 1)]


def _read_frequencies(reader: ByteReader, size: int) -> Integers:
    number = reader.take(1)[0]
    if number == COUNTED:
        return _frequencies(_from_levels(np.frombuffer(reader.take(size), np.uint8)))
    bank = _bank(size)
    if number >= len(bank):
        raise FmpqError(f"distribution {number} of {len(bank)}")
    row: Integers = bank[number]
    return row


def _raw_bits(low: int, high: int) -> int:
    return max(0, (high - low).bit_length() - MODELED_BITS)


def _split(weights: Integers, low: int, high: int) -> tuple[int, Integers]:
    """Return how many of the lowest bits get no model, and what is above them, from 0 up."""
    if weights.ndim != 3 or weights.min() < low or weights.max() > high:
        raise ValueError(f"weights {weights.shape} are not (out, in, places) or not in [{low}, {high}]")
    raw = _raw_bits(low, high)
    return raw, (weights - low).astype(np.int64) >> raw


def _packed(values: Integers, bits: int) -> bytes:
    """Return the lowest ``bits`` of every value, without gaps."""
    places = values.ravel()[:, None] >> np.arange(bits) & 1
    return np.packbits(places.astype(np.uint8)).tobytes()


def _unpacked(data: bytes, count: int, bits: int) -> Integers:
    places = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    values: Integers = places.astype(np.int64) @ (1 << np.arange(bits))
    return values
