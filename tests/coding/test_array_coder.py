"""The coder of whole arrays of latents: every symbol comes back, and a string that is altered is refused."""

import numpy as np
import pytest
import torch
from compressai.entropy_models import GaussianConditional
from compressai.models.google import get_scale_table
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fmpq_fx import FmpqError
from fmpq_fx.coding.array_coder import ArrayCoder
from fmpq_fx.coding.string_coder import MOST_SYMBOL
from support.damage import damaged

Integers = NDArray[np.int32]


@pytest.fixture(scope="module")
def coder() -> ArrayCoder:
    prior = GaussianConditional(None)
    prior.update_scale_table(get_scale_table(levels=16))
    return ArrayCoder(prior.quantized_cdf, prior.cdf_length, prior.offset)


def latents(seed: int, count: int, far: int) -> tuple[Integers, Integers]:
    """Return symbols, ``far`` of which may be anywhere, and their indexes."""
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, 16, count).astype(np.int32)
    symbols = np.rint(rng.normal(0, get_scale_table(levels=16).numpy()[indexes])).astype(np.int32)
    symbols[:far] = rng.integers(-MOST_SYMBOL, MOST_SYMBOL + 1, count)[:far]
    return symbols, indexes


@given(st.integers(0, 2**32 - 1), st.integers(0, 500), st.integers(0, 20))
@settings(deadline=None)
def test_symbols_come_back(coder: ArrayCoder, seed: int, count: int, far: int) -> None:
    symbols, indexes = latents(seed, count, far)
    assert np.array_equal(coder.decode(coder.encode(symbols, indexes), indexes), symbols)


@pytest.mark.parametrize("symbol", [-MOST_SYMBOL, MOST_SYMBOL, 0, 1, -1])
def test_a_symbol_alone_comes_back(coder: ArrayCoder, symbol: int) -> None:
    for index in range(16):
        alone = np.array([symbol], np.int32), np.array([index], np.int32)
        assert coder.decode(coder.encode(*alone), alone[1]).tolist() == [symbol]


def test_latents_take_what_their_tables_say(coder: ArrayCoder) -> None:
    prior = GaussianConditional(None)
    prior.update_scale_table(get_scale_table(levels=16))
    symbols, indexes = latents(0, 20_000, 0)
    flat = torch.from_numpy(symbols).view(1, 1, -1), torch.from_numpy(indexes).view(1, 1, -1)
    assert len(coder.encode(symbols, indexes)) <= len(prior.compress(*flat)[0]) + 8


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_another_string_is_refused(coder: ArrayCoder, data: st.DataObject) -> None:
    symbols, indexes = latents(0, 60, 5)
    string = coder.encode(symbols, indexes)
    other = damaged(string, data)
    with pytest.raises(FmpqError, match="a string "):
        coder.decode(other, indexes)


def test_what_cannot_be_coded_is_refused(coder: ArrayCoder) -> None:
    one = np.zeros(1, np.int32)
    for far in (MOST_SYMBOL + 1, -MOST_SYMBOL - 1, -(2**31)):
        with pytest.raises(FmpqError, match="steps away from its mean"):
            coder.encode(one + np.int32(far), one)
    for indexes in (one - 1, one + 16, one[None], np.zeros(2, np.int32)):
        with pytest.raises(ValueError, match="indexes"):
            coder.encode(one, indexes)
