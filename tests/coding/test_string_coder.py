"""What CompressAI's coder cannot do is an error, and what was damaged a warning; nothing crashes or hangs."""

import contextlib
import copy
import random
import warnings
import zlib
from typing import Any

import pytest
import torch

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.coding import fmi, string_coder
from support.coded_models import WAYS_TO_CODE, codec, latents, lively, quantized

DAMAGED = "does not end with its last symbol"


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
def test_latents_that_are_no_numbers_are_an_error(name: str) -> None:
    _, x = lively(name)
    with torch.no_grad(), pytest.raises(FmpqError, match=r"steps away from its mean.*hold NaN"):
        codec(name).compress(x[:1] * float("nan"))


def test_means_too_large_for_the_coder_are_an_error_on_the_float_path_too() -> None:
    gm = copy.deepcopy(quantized("mean-scale hyperprior", None))
    with torch.no_grad():
        gm.get_submodule("h_s.4").layer.bias.fill_(1e9)
        floating: Any = fmpq_fx.convert(gm, exact=False)
        with pytest.raises(FmpqError, match="steps away from its mean"):
            floating.compress(lively("mean-scale hyperprior")[1])


@pytest.mark.parametrize("name", WAYS_TO_CODE)
def test_intact_strings_give_no_warning_and_damaged_ones_do(name: str) -> None:
    x = lively(name)[1][:1, :, :64, :64]
    with torch.no_grad():
        coded = copy.deepcopy(codec(name)).compress(x)  # a copy is guarded as well
    strings = coded["strings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(codec(name), coded)
    altered = bytes([strings[0][0][0] ^ 1]) + strings[0][0][1:]
    for first in (strings[0][0][:-4], altered, strings[0][0] + b"more"):
        with pytest.warns(UserWarning, match=DAMAGED):
            latents(codec(name), {**coded, "strings": [[first], *strings[1:]]})


def test_a_string_ends_where_its_symbols_do() -> None:
    tables = [[0, 2**15, 2**16 - 1, 2**16]], [4], [-1]
    symbols = [-1, 0, 70, -3000, 2**26, -(2**26), 0] * 50
    string = string_coder.encode(symbols, [0] * len(symbols), tables)
    for count in (len(symbols), len(symbols) - 1):
        reader = string_coder.StringReader(string, count)
        half = reader.read([0] * (count // 2), tables)
        assert half + reader.read([0] * (count - count // 2), tables) == symbols[:count]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reader.end()
        assert len(caught) == (count < len(symbols))
    with pytest.raises(FmpqError, match=f"{2**26 + 1} steps"):
        string_coder.encode([0, 0, 0, -(2**26) - 1], [0] * 4, tables)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_few_symbols_that_compressai_writes_beyond_its_memory_are_refused(count: int) -> None:
    with pytest.raises(FmpqError, match=f"a string of {count} latents"):
        string_coder.encode([0] * count, [0] * count, ([[0, 2**15, 2**16]], [3], [0]))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return ``content`` with one to four accidents: a cut end, bytes put in, or a byte changed."""
    altered = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        kind, place = chance.randrange(4), chance.randrange(len(altered) + 1)
        if kind == 0:
            del altered[place:]
        elif kind == 1:
            altered[place:place] = chance.randbytes(chance.randint(1, 40))
        elif altered:
            altered[place % len(altered)] = chance.choice([0, 255, chance.randrange(256)])
    return bytes(altered)


@pytest.mark.filterwarnings(f"ignore:.*{DAMAGED}:UserWarning")
@pytest.mark.parametrize("name", ["mean-scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
def test_no_damage_crashes_or_hangs(name: str) -> None:
    # The coder is C++, which might well: a crash would end the run of the tests itself.
    chance, x, model = random.Random(0), lively(name)[1][:1, :, :64, :64].clamp(0, 1), codec(name)
    data = fmpq_fx.encode(model, x)
    with torch.no_grad():
        coded = model.compress(x)
    for _ in range(4):
        with torch.no_grad():
            strings = [[damaged(string, chance) for string in group] for group in coded["strings"]]
            assert model.decompress(strings, coded["shape"])["x_hat"].shape == x.shape
        forged = damaged(data[9:], chance)
        head = fmi.MAGIC + bytes([fmi.VERSION]) + zlib.crc32(forged).to_bytes(4, "big")
        for bad in (damaged(data, chance), head + forged):
            with contextlib.suppress(FmpqError):
                assert fmpq_fx.decode(model, bad).shape[0] == 3
