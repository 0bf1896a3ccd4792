"""Model files that someone altered and gave the right checksum: none loads as something else, and none does harm."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.storage import container
from support import naive_weights
from support.small_models import small_model
from support.trained_graphs import trained

ROUNDS = 100


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "file"
    fmpq_fx.save(trained(small_model("bmshj2018-hyperprior")), path)
    return path


def altered(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` cut, with bytes that were put in, or with other bytes in a few places."""
    content = bytearray(data)
    place = rng.randrange(len(content) + 1)
    match rng.randrange(4):
        case 0:
            del content[place : place + rng.randint(1, 8)]
        case 1:
            content[place:place] = rng.randbytes(rng.randint(1, 8))
        case 2:
            content[place:] = rng.randbytes(rng.randint(0, 40))
        case _:
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def with_damage(held: container.Container, rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """Return the name of a part of the file, and all parts, of which that one is altered."""
    name = rng.choice(sorted(held.data))
    part = held.data[name]
    if not name.startswith("weights.") and rng.random() < 0.7:  # else LZMA's own checksum is what refuses it
        return name, {**held.data, name: container.packed(altered(container.unpacked(part), rng))}
    return name, {**held.data, name: altered(part, rng)}


def test_files_with_damage_and_the_right_checksum_are_refused_or_hold_what_they_say(
    honest: Path, tmp_path: Path
) -> None:
    held, rng = container.read(honest), random.Random(0)
    refused = []
    for _ in range(ROUNDS):
        name, parts = with_damage(held, rng)
        container.write(tmp_path / "file", {"model": held.about["model"]}, parts)
        try:
            codec = fmpq_fx.load_codec(tmp_path / "file", exact=False)
        except FmpqError as error:
            refused.append(str(error))
            continue
        if name.startswith("weights."):
            layer: Any = codec.get_submodule(name.removeprefix("weights."))
            integers, of = layer.integers.numpy(), layer.weight_quantizer
            said = naive_weights.weights_of(parts[name], integers.shape, of.low, of.high)
            assert said == dict(np.ndenumerate(integers)), "another reader finds other weights"
    assert len(refused) > ROUNDS / 2
    assert all(str(tmp_path / "file") in message for message in refused)
