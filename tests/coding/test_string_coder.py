"""What CompressAI's coder cannot do is an error, and what was damaged a warning; nothing crashes or hangs."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.coding import string_coder
from support import TESTS
from support.coded_models import CODED, codec, latents, lively, quantized

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


@pytest.mark.parametrize("name", CODED)
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
        string_coder.encode([0, -(2**26) - 1], [0, 0], tables)


FUZZ = """
import random, sys, warnings, zlib
sys.path.insert(0, sys.argv[1])
import torch
from support.coded_models import codec, lively
import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.coding import fmi

warnings.simplefilter("ignore")
torch.set_num_threads(1)
name, rounds, random = sys.argv[2], int(sys.argv[3]), random.Random(0)
x, model = lively(name)[1][:1, :, :64, :64].clamp(0, 1), codec(name)
data = fmpq_fx.encode(model, x)
body = data[9:]
with torch.no_grad():
    coded = model.compress(x)


def damaged(content):
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        kind, place = random.randrange(4), random.randrange(len(content) + 1)
        if kind == 0:
            del content[place:]
        elif kind == 1:
            content[place:place] = random.randbytes(random.randint(1, 40))
        elif content:
            content[place % len(content)] = random.choice([0, 255, random.randrange(256)])
    return bytes(content)


for number in range(rounds):
    with torch.no_grad():
        strings = [[damaged(s) for s in group] for group in coded["strings"]]
        values = model.decompress(strings, coded["shape"])["x_hat"]
    assert values.shape == x.shape
    forged = damaged(body)
    head = fmi.MAGIC + bytes([fmi.VERSION]) + zlib.crc32(forged).to_bytes(4, "big")
    for bad in (damaged(data), head + forged):
        try:
            image = fmpq_fx.decode(model, bad)
            assert image.shape[0] == 3
        except FmpqError:
            pass
"""


@pytest.mark.parametrize("name", ["mean-scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
def test_no_damage_crashes_or_hangs(name: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FUZZ, str(TESTS), name, "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
