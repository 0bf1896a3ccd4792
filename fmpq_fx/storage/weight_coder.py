"""Lossless entropy coding of integer weights (:mod:`fmpq_fx.storage.rans`), under a model that fits in few bytes.

The spread of a weight is roughly a product of three factors: of its output channel, of its input channel and of its
place in the kernel. So every channel and place gets a factor (a byte, in eighths of an octave), and weights are sorted
into classes by the sum of their three factors. Each class has its own distribution: a discretized logistic one from a
bank (one byte), or counted frequencies (one byte per symbol) if these take less. Classes of several widths, and a
single class, are tried; the smallest form is taken, side information included.

The coded form, in this order:

====================  ============================================================================================
1 byte                ``step``, the width of a class in eighths of an octave; 0 is a single class
(out + in + places)   factors, int8, if ``step`` is not 0
per class             one byte: a number in the bank, or 255 and then one byte per symbol
ceil(size * raw / 8)  the ``raw`` lowest bits of every integer, if integers have more than 10 bits
the rest              the coder's string, of the bits above these
====================  ============================================================================================

The string goes place by place. Within a place, the pairs of an output and an input channel come in the order of the sum
of their factors, so that the weights of a class are a run.

Decoding is the same on every machine: frequencies come from integers and from additions, multiplications and
divisions of float64 in a fixed order, which IEEE 754 rounds alike everywhere. The encoder chooses by logarithms, which
may differ in the last bit; but any choice decodes.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage import rans
from fmpq_fx.storage.byte_reader import ByteReader

Integers = NDArray[np.int64]

# Highest bits of an integer, which are modeled; lower bits are noise, and modeling them is slow.
MODELED_BITS = 10
STEPS = (2, 4, 8)  # widths of a class that are tried, eighths of an octave
FACTOR = 8.0  # steps of a factor in an octave
LEAST = 128  # least frequency of a symbol, of 2^24; it keeps outliers cheap, which a logistic distribution does not
COUNTED = 255  # says that a table of frequencies follows, in the place of a number in the bank
_FITS = 3  # rounds of fitting the factors; the third changes little


@dataclass(frozen=True)
class Coded:
    """Integer weights in their coded form."""

    side: bytes  # the model of the symbols
    raw: bytes  # the lowest bits of integers of many bits
    symbols: bytes  # the coder's string

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
    factors = _factors(symbols - symbols.mean().round())
    candidates = [_fitted(symbols, size, step, factors) for step in (0, *STEPS)]
    model = min(candidates, key=lambda candidate: candidate.bits)
    parts = np.split(model.runs.sorted(symbols), model.runs.counts.cumsum()[:-1])
    string = rans.encode(list(zip(parts, model.runs.distributions(model.frequencies), strict=True)))
    return Coded(model.side, _packed(weights - low, raw), string)


def coded_bytes(weights: Integers, low: int, high: int) -> int:
    """Return the number of bytes that :func:`encode` makes of ``weights``."""
    return len(bytes(encode(weights, low, high)))


def decode(data: bytes, shape: tuple[int, ...], low: int, high: int) -> NDArray[np.int32]:
    """Return the weights that :func:`encode` made ``data`` of, (out, in, places).

    Raises:
        FmpqError: ``data`` is not the coded form of weights of that shape and range.
    """
    raw, reader = _raw_bits(low, high), ByteReader(data)
    runs, frequencies = _read_model(reader, shape, (high - low >> raw) + 1)
    lowest = reader.take(-(-math.prod(shape) * raw // 8))
    models = runs.distributions(frequencies)
    symbols = rans.decode(reader.rest(), list(zip(runs.counts.tolist(), models, strict=True)))
    weights = runs.unsorted(symbols, shape)
    if raw:
        weights = (weights << raw) + _unpacked(lowest, shape, raw)
        if weights.max() > high - low:
            raise FmpqError(f"a weight of {weights.max() + low}, above {high}")
    weights += low
    return weights


def side_bytes(data: bytes, shape: tuple[int, ...], low: int, high: int) -> int:
    """Return how many bytes of ``data`` are the model of the symbols."""
    reader = ByteReader(data)
    _read_model(reader, shape, (high - low >> _raw_bits(low, high)) + 1)
    return reader.position


@dataclass(frozen=True)
class _Runs:
    """The order in which weights are coded, in which the weights of a class are runs."""

    pairs: Integers  # numbers of the pairs (output, input channel), in their order in each place
    classes: Integers  # the class of every run
    counts: Integers  # weights in every run

    def distributions(self, frequencies: list[Integers]) -> list[rans.Distribution]:
        """Return the distribution of every run, from the frequencies of every class."""
        made = [rans.distribution(row) for row in frequencies]
        return [made[c] for c in self.classes.tolist()]

    def sorted(self, weights: Integers) -> rans.Symbols:
        """Return ``weights``, (out, in, places), in this order."""
        rows = weights.reshape(len(self.pairs), -1)
        return rows[self.pairs].T.astype(np.int32).ravel()

    def unsorted(self, symbols: rans.Symbols, shape: tuple[int, ...]) -> rans.Symbols:
        """Return the weights in their own order, of this ``shape``; the inverse of :meth:`sorted`."""
        weights = np.empty((len(self.pairs), shape[2]), np.int32)
        weights[self.pairs] = symbols.reshape(shape[2], -1).T
        return weights.reshape(shape)


@dataclass(frozen=True)
class _Model:
    """A model for coding an array of symbols."""

    runs: _Runs
    frequencies: list[Integers]  # frequencies of the symbols in each class
    side: bytes  # the model itself, coded for the decoder
    bits: float  # bits of the symbols and of ``side`` together


def _fitted(symbols: Integers, size: int, step: int, factors: list[NDArray[np.int8]]) -> _Model:
    """Return the model that sorts ``symbols`` into classes, each with the distribution of the fewest bits."""
    runs = _runs(symbols.shape, step, factors)
    header = bytes([step]) + (b"".join(f.tobytes() for f in factors) if step else b"")
    number = int(runs.classes.max()) + 1
    places = np.repeat(runs.classes, runs.counts) * size + runs.sorted(symbols)
    counts = np.bincount(places, minlength=number * size).reshape(number, size)
    bank = _bank(size)
    levels = _levels(counts)
    own = _frequencies(_from_levels(levels))
    counted = 8 * size + (counts * _costs(own)).sum(1)
    choices, frequencies, bits = [], [], 8.0 * len(header)
    for c, costs in enumerate(counts @ _costs(bank).T):
        best = int(costs.argmin())
        smaller = counted[c] < costs[best]
        choices.append(bytes([COUNTED]) + levels[c].tobytes() if smaller else bytes([best]))
        frequencies.append(own[c] if smaller else bank[best])
        bits += 8 + min(counted[c], costs[best])
    return _Model(runs, frequencies, header + b"".join(choices), bits)


def _costs(frequencies: Integers) -> NDArray[np.float64]:
    """Return the bits of a symbol of each of ``frequencies``."""
    bits: NDArray[np.float64] = -np.log2(frequencies / 2**rans.PRECISION)
    return bits


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


def _runs(shape: tuple[int, ...], step: int, factors: list[NDArray[np.int8]]) -> _Runs:
    """Return the runs of a layer: the class of a weight is the sum of its factors, divided by ``step``.

    Empty classes are left out. If ``step`` is 0, there is one class.
    """
    if not step:
        return _Runs(np.arange(shape[0] * shape[1]), np.zeros(1, np.int64), np.array([math.prod(shape)]))
    outputs, inputs, places = (f.astype(np.int64) for f in factors)
    sums = (outputs[:, None] + inputs).ravel()
    pairs = sums.argsort(kind="stable")
    least, most = ((end(sums) + end(places)) // step for end in (np.min, np.max))
    # Bounds of the pairs' sums, for each class in each place.
    bounds = np.arange(least, most + 2) * step - places[:, None]
    counts = np.diff(np.searchsorted(sums[pairs], bounds), axis=1)
    classes = np.cumsum(counts.any(0)) - 1
    place, level = counts.nonzero()
    return _Runs(pairs, classes[level], counts[place, level])


@lru_cache
def _bank(size: int) -> Integers:
    """Return frequencies of logistic distributions about the middle of ``size`` symbols, one per row.

    Their scale s doubles up to 1, and then grows by about a quarter from row to row. With r = exp(-1 / (2 s)), the
    probability of a distance of at most k + 1/2 from the middle follows from 1 / (1 + r^(2k + 1)). The second half of
    the bank has its middle at the first symbol, for integers that are never negative.
    """
    scales = [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    while (scale := scales[-1] + max(1, scales[-1] // 4)) < 8 * size:
        scales.append(scale)
    ratios = np.array([[scale / (scale + 4)] for scale in scales])
    powers = np.multiply.accumulate(ratios.repeat(2 * size, 1), axis=1)
    inside = 1 / (1 + powers[:, ::2])
    weights = np.concatenate([2 * inside[:, :1] - 1, np.diff(inside)], axis=1)
    centers = (np.abs(np.arange(size) - center) for center in (size // 2, 0))
    return _frequencies(np.concatenate([weights[:, distance] for distance in centers]))


def _levels(counts: Integers) -> NDArray[np.uint8]:
    """Return rows of counts as logarithms, in eighths of an octave below the row's largest; 255 is a count of 0."""
    with np.errstate(divide="ignore"):
        below = FACTOR * np.log2(counts.max(1, keepdims=True) / counts)
    return np.where(counts > 0, np.rint(np.minimum(below, 254)), 255).astype(np.uint8)


def _from_levels(levels: NDArray[np.uint8]) -> NDArray[np.float64]:
    eighths = np.array([256, 235, 215, 197, 181, 166, 152, 140], np.float64)  # 256 * 2^(-i / 8)
    weights = eighths[levels % 8] * np.ldexp(1.0, -(levels // 8).astype(np.int64))
    return np.where(levels < 255, weights, 0.0)


def _frequencies(weights: NDArray[np.float64]) -> Integers:
    """Return rows of integers, at least LEAST each, in proportion to ``weights``, with the sum 2^PRECISION."""
    total = np.add.accumulate(weights, axis=1)[:, -1:]  # adds in this order; sum() may not
    if not (total > 0).all():
        raise FmpqError("a class in which no symbol ever occurs")
    whole = 1 << rans.PRECISION
    shared = np.floor(weights / total * (whole - LEAST * weights.shape[1])).astype(np.int64)
    frequencies = LEAST + shared
    frequencies[np.arange(len(weights)), weights.argmax(1)] += whole - frequencies.sum(1)
    result: Integers = frequencies
    return result


def _read_model(reader: ByteReader, shape: tuple[int, ...], size: int) -> tuple[_Runs, list[Integers]]:
    """Return the runs of a layer, and the frequencies of each class."""
    step = reader.take(1)[0]
    if step not in (0, *STEPS):
        raise FmpqError(f"a class is {step} eighths of an octave wide")
    factors = [np.frombuffer(reader.take(count), np.int8) for count in shape] if step else []
    runs = _runs(shape, step, factors)
    return runs, [_read_frequencies(reader, size) for _ in range(int(runs.classes.max()) + 1)]


def _read_frequencies(reader: ByteReader, size: int) -> Integers:
    number = reader.take(1)[0]
    if number == COUNTED:
        levels = np.frombuffer(reader.take(size), np.uint8)
        row: Integers = _frequencies(_from_levels(levels[None]))[0]
        return row
    bank = _bank(size)
    if number >= len(bank):
        raise FmpqError(f"distribution {number} of {len(bank)}")
    row = bank[number]
    return row


def _raw_bits(low: int, high: int) -> int:
    return max(0, (high - low).bit_length() - MODELED_BITS)


def _split(weights: Integers, low: int, high: int) -> tuple[int, Integers]:
    """Return the number of lowest bits without a model, and the integers above these bits, from 0 up."""
    if weights.ndim != 3 or weights.min() < low or weights.max() > high:
        raise ValueError(f"weights {weights.shape} are not (out, in, places) or not in [{low}, {high}]")
    raw = _raw_bits(low, high)
    return raw, (weights - low).astype(np.int64) >> raw


def _packed(values: Integers, bits: int) -> bytes:
    """Return the lowest ``bits`` of every value, without gaps."""
    places = values.ravel()[:, None] >> np.arange(bits) & 1
    return np.packbits(places.astype(np.uint8)).tobytes()


def _unpacked(data: bytes, shape: tuple[int, ...], bits: int) -> rans.Symbols:
    count = math.prod(shape)
    places = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(*shape, bits)
    values: rans.Symbols = places.astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32))
    return values
