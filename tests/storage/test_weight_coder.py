"""The entropy coder of weights: lossless, smaller than what knows no weights, and safe whatever it is given."""

import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import laplace

from fmpq_fx import FmpqError
from fmpq_fx.quant import integer_range
from fmpq_fx.storage.weight_coder import COUNTED, coded_bytes, decode, encode, side_bytes
from support import naive_weights

Integers = NDArray[np.int64]
Shape = tuple[int, ...]
Range = tuple[int, int]  # the least and the largest weight
Drawn = tuple[Integers, int, int]  # weights and their range

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(3, 25))
RANGES = st.builds(integer_range, st.integers(2, 16), st.booleans())

KINDS: dict[str, Callable[[np.random.Generator, Shape, int, int], Integers]] = {
    "any": lambda rng, shape, low, high: rng.integers(low, high + 1, shape),
    "ends": lambda rng, shape, low, high: rng.choice(np.array([low, high]), shape),
    "zeros": lambda rng, shape, low, high: np.zeros(shape, np.int64),
    "constant": lambda rng, shape, low, high: np.full(shape, rng.integers(low, high + 1)),
    "spread": lambda rng, shape, low, high: laplacian(rng, shape, low, high, 4.0),
}


def laplacian(rng: np.random.Generator, shape: Shape, low: int, high: int, octaves: float) -> Integers:
    """Draw weights as layers have them, with a spread per channel that varies by that many octaves (deviation)."""
    outputs, inputs, places = (np.exp2(rng.normal(0, octaves, count)) for count in shape)
    spread = outputs[:, None, None] * inputs[:, None] * places ** (1 / 4)
    return on_grid(rng.laplace(0, high / 8, shape) * spread / np.median(spread), low, high)


def on_grid(values: NDArray[np.float64], low: int, high: int) -> Integers:
    return np.clip(np.rint(values), low, high).astype(np.int64)


@st.composite
def weights_in_range(draw: st.DrawFn) -> Drawn:
    low, high = draw(RANGES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return KINDS[draw(st.sampled_from(sorted(KINDS)))](rng, draw(SHAPES), low, high), low, high


def assert_safe(data: bytes, shape: Shape, low: int, high: int) -> None:
    """Check that ``data`` is refused, or is the coded form of weights of that shape and range."""
    try:
        weights = decode(data, shape, low, high)
    except FmpqError:
        return
    assert weights.shape == shape
    assert low <= weights.min() <= weights.max() <= high
    assert_same_weights(data, weights, low, high)


def assert_same_weights(data: bytes, weights: NDArray[Any], low: int, high: int) -> None:
    """Check that another reader finds ``weights`` in ``data``."""
    found = naive_weights.weights_of(data, weights.shape, low, high)
    assert found == dict(np.ndenumerate(weights))


@given(weights_in_range())
@settings(deadline=None, max_examples=150)
def test_what_was_coded_comes_back(drawn: Drawn) -> None:
    weights, low, high = drawn
    coded = encode(weights, low, high)
    data = bytes(coded)
    found = decode(data, weights.shape, low, high)
    assert np.array_equal(found, weights)
    assert_same_weights(data, weights, low, high)
    assert data == coded.side + coded.raw + coded.symbols
    assert coded_bytes(weights, low, high) == len(data)
    assert side_bytes(data, weights.shape, low, high) == len(coded.side)
    assert len(coded.raw) == -(-weights.size * max(0, (high - low).bit_length() - 10) // 8)


@pytest.mark.parametrize("bits", [2, 4, 8, 10, 11, 16])
def test_a_layer_of_ordinary_size_comes_back(bits: int) -> None:
    low, high = integer_range(bits, True)
    rng = np.random.default_rng(bits)
    for octaves in (0.0, 1.0, 6.0):
        weights = laplacian(rng, (24, 16, 9), low, high, octaves)
        assert np.array_equal(decode(bytes(encode(weights, low, high)), weights.shape, low, high), weights)
        view = weights.transpose(1, 0, 2)[:, ::-1]  # neither contiguous nor in order
        assert np.array_equal(decode(bytes(encode(view, low, high)), view.shape, low, high), view)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_a_weight_or_two_come_back(shape: Shape) -> None:
    for weights in (np.zeros(shape, np.int64), np.full(shape, -1), np.full(shape, 7)):
        assert np.array_equal(decode(bytes(encode(weights, -7, 7)), shape, -7, 7), weights)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "gzip": lambda data: gzip.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_weights_take_fewer_bytes_than_with_a_compressor_for_anything(
    bits: int, compress: Callable[[bytes], bytes]
) -> None:
    low, high = integer_range(bits, True)
    weights = laplacian(np.random.default_rng(bits), (64, 64, 25), low, high, 0.7)
    assert coded_bytes(weights, low, high) < len(compress(weights.astype(np.int8).tobytes()))


def entropy(weights: Integers) -> float:
    """Return the bytes that ``weights`` take if each costs what the histogram of all of them says."""
    _, counts = np.unique(weights, return_counts=True)
    return float(-counts @ np.log2(counts / weights.size)) / 8


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_weights_of_one_distribution_take_their_entropy(bits: int, signed: bool) -> None:
    low, high = integer_range(bits, signed)
    weights = laplacian(np.random.default_rng(bits), (48, 48, 25), low, high, 0.0)
    weights = weights if signed else np.abs(weights)
    assert entropy(weights) - 1 < coded_bytes(weights, low, high) < 1.01 * entropy(weights) + 64


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["output channels", "input channels", "places"])
def test_a_spread_that_depends_on_the_channel_or_the_place_saves_bytes(bits: int, axis: int) -> None:
    low, high = integer_range(bits, True)
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.normal(bits - 6, 1.5, 40)).reshape([40 if d == axis else 1 for d in range(3)])
    weights = on_grid(rng.laplace(0, 1, (40, 40, 40)) * spread, low, high)
    assert coded_bytes(weights, low, high) < 0.95 * entropy(weights)
    # Who knows the distribution of every weight needs this many bytes.
    below = laplace.cdf(np.where(weights == low, -np.inf, weights - 0.5) / spread)
    above = laplace.cdf(np.where(weights == high, np.inf, weights + 0.5) / spread)
    assert coded_bytes(weights, low, high) < 1.015 * -np.log2(above - below).sum() / 8 + 250


def test_a_layer_of_zeros_takes_next_to_nothing() -> None:
    assert coded_bytes(np.zeros((100, 100, 10), np.int64), -7, 7) < 32


@pytest.mark.parametrize("pair", [(-127, 127), (0, 1), (-5, 90)])
def test_two_values_however_far_apart_cost_a_bit_each(pair: Range) -> None:
    weights = np.random.default_rng(0).choice(np.array(pair), (40, 40, 10))
    assert coded_bytes(weights, -127, 127) < 1.02 * weights.size / 8 + 300


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.full((2, 3, 4), 8), r"\(2, 3, 4\).*\[-7, 7\]"),
        (np.full((2, 3, 4), -8), r"\[-7, 7\]"),
        (np.zeros((2, 3), np.int64), r"\(2, 3\) are not \(out, in, places\)"),
    ],
)
def test_weights_out_of_range_or_of_another_layout_are_refused(weights: Integers, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(weights, -7, 7)


SIZES = [2**bits - unsigned for bits in range(2, 11) for unsigned in (0, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_the_bank_is_the_one_that_files_were_written_with(size: int) -> None:
    # If this fails, files written before can no longer be read: raise container.VERSION.
    rows = naive_weights.bank(size)
    assert len(rows) < COUNTED
    for number, row in enumerate(rows):
        symbols = [0, size - 1, size // 2, size // 3, number % size, 0]
        data = bytes([0, number]) + naive_weights.encoded(symbols, [row] * 6)
        assert decode(data, (1, 2, 3), 0, size - 1).ravel()[[0, 3, 1, 4, 2, 5]].tolist() == symbols
    with pytest.raises(FmpqError, match=f"distribution {len(rows)} of {len(rows)}"):
        decode(bytes([0, len(rows)]) + bytes(8), (1, 2, 3), 0, size - 1)


@given(st.binary(min_size=2, max_size=1024))
@settings(deadline=None)
def test_whatever_was_counted_makes_a_distribution(levels: bytes) -> None:
    assume(set(levels) != {255})
    symbols = [0, len(levels) - 1, len(levels) // 2]
    string = naive_weights.encoded(symbols, [naive_weights.counted(levels)] * 3)
    found = decode(bytes([0, COUNTED]) + levels + string, (1, 3, 1), 0, len(levels) - 1)
    assert found.ravel().tolist() == symbols


def test_a_small_array_is_coded_as_ever() -> None:
    weights = np.array([[[-7, 0, 1], [0, 7, 0]], [[2, -1, 0], [0, 0, 3]]])
    assert bytes(encode(weights, -7, 7)).hex() == "000e0cacc9a27a88017cdc020000"


@pytest.mark.parametrize("bits", [2, 5, 12])
def test_a_string_that_ends_early_is_refused_or_safe(bits: int) -> None:
    low, high = integer_range(bits, True)
    weights = laplacian(np.random.default_rng(0), (6, 5, 9), low, high, 3.0)
    data = bytes(encode(weights, low, high))
    for length in range(len(data)):
        assert_safe(data[:length], weights.shape, low, high)


@given(weights_in_range(), st.data())
@settings(deadline=None, max_examples=200)
def test_what_was_tampered_with_is_refused_or_safe(drawn: Drawn, data: st.DataObject) -> None:
    weights, low, high = drawn
    content = bytearray(bytes(encode(weights, low, high)))
    kept = data.draw(st.integers(0, len(content)))
    content[kept:] = data.draw(st.one_of(st.just(content[kept:]), st.binary(max_size=24)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)) if content else []:
        content[place] = data.draw(st.integers(0, 255))
    assert_safe(bytes(content), weights.shape, low, high)


@given(st.sampled_from([b"", b"\0", b"\2", b"\4", b"\b"]), st.binary(max_size=80), SHAPES, RANGES)
@settings(deadline=None, max_examples=200)
def test_random_bytes_are_refused_or_safe(step: bytes, content: bytes, shape: Shape, range_: Range) -> None:
    assert_safe(step + content, shape, *range_)


@pytest.mark.parametrize("string", [b"", bytes(8), bytes(7) + b"\x80", b"\xff" * 3], ids=repr)
def test_a_layer_whose_string_is_no_string_is_refused(string: bytes) -> None:
    with pytest.raises(FmpqError, match="a string "):
        decode(bytes([0, 0]) + string, (20, 20, 25), -7, 7)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_no_other_string_gives_weights(data: st.DataObject) -> None:
    low, high = data.draw(RANGES)
    weights = KINDS["spread"](np.random.default_rng(0), (5, 4, 9), low, high)
    coded = encode(weights, low, high)
    string = bytearray(coded.symbols)
    string[data.draw(st.integers(0, len(string))) :] = data.draw(st.binary(max_size=9))
    for place in data.draw(st.lists(st.integers(0, len(string) - 1), max_size=4)) if string else []:
        string[place] = data.draw(st.integers(0, 255))
    assume(bytes(string) != coded.symbols)
    with pytest.raises(FmpqError, match="a string "):
        decode(coded.side + coded.raw + bytes(string), weights.shape, low, high)
