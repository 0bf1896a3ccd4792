"""The coded form of weights, read a second time: in plain Python, one symbol after the other, with integers alone."""

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, product

WHOLE = 1 << 24
START = 1 << 31

Row = Sequence[int]  # frequencies, with the sum WHOLE


def encoded(symbols: Sequence[int], rows: Sequence[Row]) -> bytes:
    """Return the string of ``symbols``, each with the frequencies in the row beside it."""
    state, stack = START, []
    for symbol, row in zip(reversed(symbols), reversed(rows), strict=True):
        if state >> 40 >= row[symbol]:
            stack.append(state & 0xFFFFFFFF)
            state >>= 32
        high, low = divmod(state, row[symbol])
        state = (high << 24) + low + sum(row[:symbol])
    stack += [state & 0xFFFFFFFF, state >> 32] if state >> 32 else [state]
    return struct.pack(f"<{len(stack)}I", *stack)


def decoded(string: bytes, rows: Iterable[Row]) -> list[int]:
    """Return the symbols of which :func:`encoded` returned ``string``."""
    stack = list(struct.unpack(f"<{len(string) // 4}I", string))
    state = stack.pop()
    if stack:
        state = state << 32 | stack.pop()
    symbols = []
    for row in rows:
        bounds = list(accumulate(row, initial=0))
        assert bounds[-1] == WHOLE
        place = state % WHOLE
        symbol = bisect_right(bounds, place) - 1
        state = row[symbol] * (state >> 24) + place - bounds[symbol]
        if state < 1 << 32 and stack:
            state = state << 32 | stack.pop()
        symbols.append(symbol)
    assert (state, stack) == (START, [])
    return symbols


def frequencies(weights: Sequence[float]) -> list[int]:
    """Return integers in proportion to ``weights``."""
    total = 0.0
    for weight in weights:
        total += weight
    shares = [128 + int(weight / total * (WHOLE - 128 * len(weights))) for weight in weights]
    shares[weights.index(max(weights))] += WHOLE - sum(shares)
    return shares


@lru_cache
def bank(size: int) -> list[list[int]]:
    """Return all distributions of ``size`` symbols that have a number."""
    rows = []
    for center in (size // 2, 0):
        scale = 1 / 64
        while scale < 8 * size:
            ratio = power = scale / (scale + 4)
            inside = []
            for _ in range(size):
                inside.append(1 / (1 + power))
                power = power * ratio * ratio
            around = [2 * inside[0] - 1, *(b - a for a, b in pairwise(inside))]
            rows.append(frequencies([around[abs(symbol - center)] for symbol in range(size)]))
            scale = scale * 2 if scale < 1 else scale + max(1, scale // 4)
    return rows


def counted(levels: bytes) -> list[int]:
    """Return the distribution that is written as one byte per symbol."""
    eighths = (256, 235, 215, 197, 181, 166, 152, 140)
    return frequencies([eighths[n % 8] * 2.0 ** -(n // 8) if n < 255 else 0.0 for n in levels])


def weights_of(data: bytes, shape: tuple[int, ...], low: int, high: int) -> dict[tuple[int, int, int], int]:
    """Return the weights in their coded form ``data``, by (output channel, input channel, place)."""
    raw = max(0, (high - low).bit_length() - 10)
    size = (high - low >> raw) + 1
    step, position = data[0], 1
    factors = [[0] * count for count in shape]
    if step:
        for axis in factors:
            axis[:] = struct.unpack_from(f"{len(axis)}b", data, position)
            position += len(axis)
    outputs, inputs, places = factors
    level = {
        (o, i, p): (outputs[o] + inputs[i] + places[p]) // (step or 1)
        for o, i, p in product(*map(range, shape))
    }
    rows = {}
    for c in sorted(set(level.values())):
        if data[position] == 255:
            rows[c] = counted(data[position + 1 : position + 1 + size])
            position += size
        else:
            rows[c] = bank(size)[data[position]]
        position += 1
    lowest = int.from_bytes(data[position : position + -(-len(level) * raw // 8)], "big")
    rest = 8 * -(-len(level) * raw // 8)
    position += rest // 8
    order = sorted(level, key=lambda at: (at[2], outputs[at[0]] + inputs[at[1]]))
    found = dict(zip(order, decoded(data[position:], [rows[level[at]] for at in order]), strict=True))
    weights = {}
    for at in level:  # their lowest bits come in this order, the least of a weight first
        rest -= raw
        bits = lowest >> rest & (1 << raw) - 1
        weights[at] = (found[at] << raw) + int(f"{bits:0{raw}b}"[::-1], 2) * (raw > 0) + low
    return weights
