"""Latents in files are coded as arrays: the same ones come back as in CompressAI's format, or there is an error."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from compressai.models.google import get_scale_table
from torch import Tensor

from fmpq_fx import FmpqError
from fmpq_fx.coding import guarded
from fmpq_fx.coding.array_model import array_model
from fmpq_fx.coding.codec import codec_of, with_settings
from fmpq_fx.coding.guarded import Coded, Kind
from support.coded_models import WAYS_TO_CODE, codec, latents, lively

MOST = 2**20


def gaussian() -> GaussianConditional:
    model = GaussianConditional(None)
    model.update_scale_table(get_scale_table(levels=16))
    return model


def as_arrays(model: EntropyModel) -> Any:
    return array_model(model, lambda symbols, coded: None)


def image() -> Tensor:
    return lively("scale hyperprior")[1][:1, :, :64, :64].clamp(0, 1)


@pytest.mark.parametrize("name", WAYS_TO_CODE)
def test_both_formats_hold_the_same_latents_in_as_many_bytes(name: str) -> None:
    ours = with_settings(codec(name), arrays=True)
    with torch.no_grad():
        coded, theirs = ours.compress(image()), codec(name).compress(image())
    assert torch.equal(latents(ours, coded), latents(codec(name), theirs))
    assert coded["strings"][1] != theirs["strings"][1]
    for (string,), (other,) in zip(coded["strings"], theirs["strings"], strict=True):
        assert len(string) <= len(other) + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cdf_of_a_scale_is_the_one_that_compressai_finds(dtype: torch.dtype) -> None:
    model = gaussian()
    scales = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)).exp().to(dtype)
    table = model.scale_table.to(dtype)  # ties
    edges = torch.tensor([0.0, -1.0, 1e9, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    for values in (scales, scales.transpose(1, 3), torch.cat([table, edges]).view(1, -1, 1, 1)):
        ours = as_arrays(model.to(dtype) if dtype == torch.float64 else model)
        assert torch.equal(ours.build_indexes(values), model.build_indexes(values))


@pytest.mark.parametrize("table", [[8.0, 0.5, 2.0, 64.0], [2.0, 2.001, 2.002, 8.0], [2.0]])
def test_the_cdf_of_a_scale_is_that_of_compressai_in_any_table(table: list[float]) -> None:
    """CompressAI refuses one without order where it makes a model, and takes it in update_scale_table()."""
    model = GaussianConditional(None)
    model.update_scale_table(table)
    known = torch.tensor([0.1, 1.0, 2.0005, 5.0, 30.0, 99.0, *table])
    scales = torch.cat([known, known.nextafter(torch.tensor(torch.inf))]).view(1, -1, 1, 1)
    assert torch.equal(as_arrays(model).build_indexes(scales), model.build_indexes(scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2, 5, 4, 3), (1, 4, 0, 2), (0, 2, 2)])
@pytest.mark.parametrize("with_means", [True, False])
def test_a_tensor_of_any_shape_and_dtype_is_what_compressai_decodes(
    shape: tuple[int, ...], dtype: torch.dtype, with_means: bool
) -> None:
    """Of 1 to 3 latents as well, for which CompressAI's coder would write in front of its memory."""
    model, generator = gaussian(), torch.Generator().manual_seed(1)
    inputs = (30 * torch.randn(shape, generator=generator)).to(dtype)
    means = torch.randn(shape, generator=generator).to(dtype) if with_means else None
    indexes = torch.randint(0, 16, shape, generator=generator)
    ours = as_arrays(model)
    decoded = ours.decompress(ours.compress(inputs, indexes, means), indexes, dtype, means)
    expected = model.dequantize(model.quantize(inputs, "symbols", means), means, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, expected)


def test_one_mean_for_all_places_of_a_channel() -> None:
    model = EntropyBottleneck(4)
    model.quantiles.data[:, 0, 1] = torch.tensor([0.3, -2.1, 0.0, 7.4])
    model.update(force=True)
    ours, x = as_arrays(model), 20 * torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    expected = model.decompress(model.compress(x), (3, 5))
    assert torch.equal(ours.decompress(ours.compress(x), (3, 5)), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda model, x, i: model.compress(x, i[:1]),
        lambda model, x, i: model.compress(x[0, 0], i[0, 0]),
        lambda model, x, i: model.decompress([b""], i),
        lambda model, x, i: model.decompress(b"ab", i),
        lambda model, x, i: model.decompress([b"", b""], i, means=x[:, :1]),
        lambda model, x, i: model.decompress([b"", b""], i, means=x[:, :, :2]),
        lambda model, x, i: as_arrays(GaussianConditional(None)).compress(x, i),
    ],
)
def test_what_does_not_fit_is_refused_where_compressai_refuses_it(make: Callable[..., object]) -> None:
    x, indexes = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"should have the same size|`strings`|`means`|Uninitialized"):
        make(as_arrays(gaussian()), x, indexes)


def in_place(model: Any) -> None:
    model.quantized_cdf[3] = model.quantized_cdf[5].clone()
    model.cdf_length[3], model.offset[3] = model.cdf_length[5], model.offset[5]


def through_data(model: Any) -> None:
    model.offset.data[:] += 2


def exchanged(model: Any) -> None:
    model.update_scale_table(get_scale_table(min=0.5, levels=16), force=True)


@pytest.mark.parametrize("change", [in_place, through_data, exchanged])
def test_tables_that_change_are_those_that_code(change: Callable[[Any], None]) -> None:
    model = gaussian()
    x, indexes = torch.arange(-8.0, 8).view(1, 1, -1), torch.full((1, 1, 16), 3)
    before = as_arrays(model).compress(x, indexes)
    change(model)
    assert (
        as_arrays(model).compress(x, indexes)
        == as_arrays(copy.deepcopy(model)).compress(x, indexes)
        != before
    )


@pytest.mark.parametrize("robust", ["auto", None])
@pytest.mark.parametrize("name", ["scale hyperprior", "mean-scale hyperprior", "a float model"])
def test_no_other_string_gives_an_image(name: str, robust: guarded.Robust) -> None:
    model: Any = (
        codec_of(copy.deepcopy(lively("scale hyperprior")[0])) if name == "a float model" else codec(name)
    )
    model.update()
    model, chance = with_settings(model, arrays=True), random.Random(0)
    with torch.no_grad():
        coded = guarded.compress(model, image(), robust)
        assert coded.kind is (
            Kind.NOT if robust is None else Kind.EXACT if model.fmpq.exact else Kind.GUARDED
        )
        for _ in range(60):
            strings = [list(group) for group in coded.strings]
            group = chance.choice(strings)
            group[0] = altered(group[0], chance)
            if strings != coded.strings:
                with pytest.raises(FmpqError, match="its latents are not what was encoded"):
                    guarded.decompress(model, Coded(strings, coded.shape, coded.kind, coded.guard), MOST)


def altered(string: bytes, chance: random.Random) -> bytes:
    """Return ``string`` cut, longer, with another byte, or another one altogether."""
    place = chance.randrange(len(string))
    return chance.choice(
        [
            string[:place],
            string[: place // 4 * 4],
            string + chance.randbytes(chance.choice([1, 4, 400])),
            string[:place] + chance.randbytes(1) + string[place + 1 :],
            chance.randbytes(4 * place),
        ]
    )
