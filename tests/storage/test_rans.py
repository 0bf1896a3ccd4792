"""The entropy coder of arrays: its strings are those of integers alone, and no other string is taken for one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fmpq_fx import FmpqError
from fmpq_fx.storage import rans
from support import naive_weights
from support.damage import damaged

Frequencies = NDArray[np.int64]

WHOLE = 1 << rans.PRECISION


@st.composite
def frequencies(draw: st.DrawFn) -> Frequencies:
    """Draw frequencies that add up to WHOLE; some are as small as can be, and some others take nearly all."""
    size = draw(st.one_of(st.integers(2, 8), st.integers(9, 1024)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = rng.exponential(size=size) ** draw(st.sampled_from([0, 1, 9, 60]))
    found = 1 + np.floor(shares / shares.sum() * (WHOLE - size)).astype(np.int64)
    found[rng.integers(size)] += WHOLE - found.sum()
    result: Frequencies = found
    return result


Run = tuple[list[int], Frequencies]


@st.composite
def runs(draw: st.DrawFn) -> list[Run]:
    drawn = draw(st.lists(frequencies(), min_size=1, max_size=4))
    lengths = [draw(st.integers(1, 40)) for _ in drawn]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    likely = draw(st.booleans())
    return [
        (rng.choice(len(f), n, p=f / WHOLE if likely else None).tolist(), f)
        for f, n in zip(drawn, lengths, strict=True)
    ]


def string_of(drawn: list[Run]) -> bytes:
    return rans.encode([(np.array(symbols, np.int32), rans.distribution(f)) for symbols, f in drawn])


def read(string: bytes, drawn: list[Run]) -> list[int]:
    found: list[int] = rans.decode(string, [(len(s), rans.distribution(f)) for s, f in drawn]).tolist()
    return found


@given(runs())
@settings(deadline=None, max_examples=200)
def test_strings_are_those_that_integers_alone_lead_to(drawn: list[Run]) -> None:
    symbols = [symbol for run, _ in drawn for symbol in run]
    rows = [f.tolist() for run, f in drawn for _ in run]
    string = string_of(drawn)
    assert string == naive_weights.encoded(symbols, rows)
    assert read(string, drawn) == symbols == naive_weights.decoded(string, rows)


@pytest.mark.parametrize("size", [2, 3, 255, 1023])
def test_every_symbol_has_exactly_its_frequency(size: int) -> None:
    # One symbol shifts the start by the frequencies before it, and divides by its own: both show in the string.
    found = np.full(size, 1)
    found[size // 2] += WHOLE - size
    for row in (found, np.diff(np.linspace(0, WHOLE, size + 1).astype(np.int64))):
        for symbol in {0, 1, size // 2, size - 1}:
            run: Run = ([symbol], row)
            assert string_of([run]) == naive_weights.encoded([symbol], [row.tolist()])


@pytest.mark.parametrize("row", [[WHOLE], [0, WHOLE], [WHOLE, -1, 1], [1, WHOLE], [1, 2], []])
def test_what_are_no_frequencies_is_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"frequencies are not at least 1 with the sum 2\^24"):
        rans.distribution(np.array(row, np.int64))


@given(runs(), st.data())
@settings(deadline=None, max_examples=200)
def test_another_string_is_refused(drawn: list[Run], data: st.DataObject) -> None:
    string = string_of(drawn)
    other = damaged(string, data)
    with pytest.raises(FmpqError, match="a string "):
        read(other, drawn)


@pytest.mark.parametrize("more", [bytes(4), b"\1\0\0\0", bytes(400), b"\0"])
def test_a_string_with_more_behind_or_before_it_is_refused(more: bytes) -> None:
    drawn: list[Run] = [([0, 1, 0, 1], np.array([1, WHOLE - 1]))]
    for other in (string_of(drawn) + more, more + string_of(drawn)):
        with pytest.raises(FmpqError, match="a string "):
            read(other, drawn)
