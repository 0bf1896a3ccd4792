"""Guarded coding: files decode where scales differ a little, and are an error where they differ more."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressai.entropy_models import GaussianConditional, GaussianMixtureConditional
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError, decode, encode
from fmpq_fx.coding import guarded
from fmpq_fx.coding.choosers import GuardReader, GuardWriter, Rehearsal
from fmpq_fx.coding.codec import codec_of, with_settings
from fmpq_fx.coding.guard import LEAST_MARGIN, MOST_MARGIN, Guard
from fmpq_fx.coding.guarded import Kind
from support.codecs.slices import Slices
from support.codecs.small import N
from support.coded_models import lively, quantized

MOST = 2**20
Noise = Callable[[Tensor], Tensor]


def stock(name: str) -> Any:
    """Return a float model with lively latents and scales that are spread over the table."""
    model: Any = copy.deepcopy(lively(name)[0])
    model.update(force=True)
    return with_settings(codec_of(model), arrays=True)  # as files are coded


def slices() -> Any:
    torch.manual_seed(1)
    model: Any = Slices().eval()
    with torch.no_grad():
        for scales in model.scales:  # from 0.1 to 10
            scales.weight.mul_(6)
            scales.bias.fill_(2.0)
    model.gaussian_conditional.update_scale_table(torch.logspace(-0.95, 2.4, 64).tolist())
    model.entropy_bottleneck.update()
    return with_settings(codec_of(model), arrays=True)  # as files are coded


GUARDED = ("mean-scale hyperprior", "mbt2018", "elic-official", "cheng2020-checkerboard")
CODECS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(stock, name) for name in GUARDED},
    "slices": slices,
}


def picture() -> Tensor:
    return lively("scale hyperprior")[1][:1, :, :64, :64].clamp(0, 1)


@contextmanager
def disturbed(noise: Noise) -> Iterator[None]:
    """Within the block, all scales that reach a guard are changed by ``noise``."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (GuardReader, Rehearsal):

            def changed(self: Any, prior: Any, scales: Tensor, indexes: Any = cls.indexes) -> Any:
                return indexes(self, prior, noise(scales))

            patch.setattr(cls, "indexes", changed)
        yield


def by(part: float) -> Noise:
    """Return a noise of up to ``part`` of each scale."""
    generator = torch.Generator().manual_seed(3)
    return lambda scales: scales * (1 + part * (2 * torch.rand(scales.shape, generator=generator) - 1))


@contextmanager
def no_kernels() -> Iterator[None]:
    library: Any = torch.backends.mkldnn
    before, library.enabled = library.enabled, False
    try:
        yield
    finally:
        library.enabled = before


@pytest.mark.parametrize("name", CODECS)
def test_it_decodes_where_all_scales_differ_by_up_to_the_margin(name: str) -> None:
    codec, x = CODECS[name](), picture()
    with torch.no_grad():
        coded = guarded.compress(codec, x, "guarded", margin=2**-12)
        expected = guarded.decompress(codec, coded, MOST)
        assert coded.kind is Kind.GUARDED
        for seed in range(3):
            torch.manual_seed(seed)
            with disturbed(by(0.999 * 2**-12)):
                assert torch.equal(guarded.decompress(codec, coded, MOST), expected)


@pytest.mark.parametrize("name", CODECS)
def test_ten_times_the_margin_is_noticed_and_the_error_says_what_would_have_done(name: str) -> None:
    codec, x = CODECS[name](), lively("scale hyperprior")[1][:1]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strings that do not end with their last symbol
        coded = guarded.compress(codec, x, "guarded", margin=2**-10)
        with disturbed(by(10 * 2**-10)), pytest.raises(FmpqError) as caught:
            guarded.decompress(codec, coded, MOST)
    assert "encode it again with a margin of" in str(caught.value)


@pytest.mark.parametrize("setting", ["no oneDNN", "float64", "channels last"])
@pytest.mark.parametrize("name", CODECS)
def test_files_decode_under_other_settings(name: str, setting: str) -> None:
    codec, image = CODECS[name](), picture()[0]
    data = encode(codec, image)
    other = copy.deepcopy(codec)
    if setting == "float64":
        other.double()
    if setting == "channels last":
        other.to(memory_format=torch.channels_last)
    with no_kernels() if setting == "no oneDNN" else nullcontext():
        assert (decode(other, data) - decode(codec, data)).abs().max() < 1e-2


def test_the_margin_is_what_other_arithmetic_needs() -> None:
    """A model whose scales differ more between kernels gets a larger margin, up to what can be guarded."""
    codec, x = stock("mean-scale hyperprior"), picture()
    margins = []
    with torch.no_grad():
        for part in (0.0, 2e-5, 2e-4):
            with disturbed(by(part)):
                coded = guarded.compress(codec, x)
            margins.append(Guard.from_bytes(coded.guard, MOST).margin)
    assert margins[0] == LEAST_MARGIN < margins[1] < margins[2] <= MOST_MARGIN
    assert margins[2] >= 4 * 1.9e-4
    with torch.no_grad(), disturbed(by(0.05)):
        with pytest.raises(FmpqError, match=r"differ by 0\.05 of their value"):
            guarded.compress(codec, x, "guarded")
        with pytest.warns(UserWarning, match="decoded as an error"):
            assert guarded.compress(codec, x).kind is Kind.CHECKED


def test_autocast_and_tf32_are_off_while_cdfs_are_chosen() -> None:
    codec, image = stock("mean-scale hyperprior"), picture()[0]
    data = encode(codec, image)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16, on processors that have it
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert encode(codec, image) == data
            assert torch.equal(decode(codec, data), decode(codec, encode(codec, image)))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_inputs_on_the_entropy_path_are_not_rounded() -> None:
    """There, rounding would make a step of a difference in the last place. In the transforms it is kept."""
    codec: Any = fmpq_fx.convert(quantized("mean-scale hyperprior"), exact=False)
    asked: dict[type, set[str]] = {GuardWriter: set(), GuardReader: set()}
    with pytest.MonkeyPatch.context() as patch:
        for cls in (GuardWriter, GuardReader):

            def noting(self: Any, layer: str, cls: Any = cls, is_float: Any = cls.is_float) -> bool:
                kept = bool(is_float(self, layer))
                asked[cls] |= {layer} if kept else set()
                return kept

            patch.setattr(cls, "is_float", noting)
        decode(codec, encode(codec, picture()[0]))
    path = {
        name for name, module in codec.named_modules() if name.startswith("h_s.") and name.count(".") == 1
    }
    layers = {name for name in path if hasattr(codec.get_submodule(name), "input_quantizer")}
    assert asked[GuardWriter] == asked[GuardReader] == layers


def test_an_exact_codec_needs_no_guard_and_a_float_one_does_not_decode_its_files() -> None:
    gm = quantized("scale hyperprior")
    exact, floating = fmpq_fx.convert(gm, exact="require"), fmpq_fx.convert(gm, exact=False)
    image = picture()[0]
    with torch.no_grad():
        for robust in ("auto", "exact"):
            coded = guarded.compress(codec_of(exact), image[None], robust)
            assert (coded.kind, coded.guard) == (Kind.EXACT, b"")
        with pytest.raises(FmpqError, match="without exact=False"):
            guarded.decompress(codec_of(floating), coded, MOST)
    with pytest.raises(FmpqError, match='robust="guarded"'):
        encode(floating, image, robust="exact")


def test_what_guards_nothing_is_refused() -> None:
    codec, image = stock("scale hyperprior"), picture()[0]
    for margin in (0.0, -1.0, 1e-50, 0.1, float("nan")):
        with pytest.raises(ValueError, match="margin is"):
            encode(codec, image, margin=margin)
    with pytest.raises(ValueError, match="robust is 'yes'"):
        encode(codec, image, robust="yes")  # type: ignore[arg-type]
    half = copy.deepcopy(codec).bfloat16()
    with pytest.raises(FmpqError, match=r"in bfloat16 cannot be guarded.*codec.float\(\)"):
        encode(half, image)


class More(Slices):
    """Asks for the CDFs of its latents in other calls where it decodes."""

    calls = 1

    def latents(self, strings: list[Any], shape: Any) -> Tensor:
        h_s = self.h_s(self.entropy_bottleneck.decompress(strings[0], shape))
        for _ in range(self.calls):
            scale, _ = self.predict(0, h_s, [])
            self.gaussian_conditional.build_indexes(scale[:, :, : scale.shape[2] // 2])
        latents: Tensor = super().latents(strings, shape)
        return latents


class Fewer(Slices):
    """Decodes nothing but its hyperprior."""

    def latents(self, strings: list[Any], shape: Any) -> Tensor:
        h_s: Tensor = self.h_s(self.entropy_bottleneck.decompress(strings[0], shape))
        return h_s[:, :N]


@pytest.mark.parametrize("cls", [More, Fewer])
def test_calls_that_differ_are_noticed_while_encoding(cls: type[nn.Module]) -> None:
    model: Any = cls().eval()
    model.load_state_dict(slices().state_dict(), strict=False)
    model.gaussian_conditional.update_scale_table(torch.logspace(-0.95, 2.4, 64).tolist())
    model.entropy_bottleneck.update()
    with pytest.raises(FmpqError, match=r"decompress\(\) calls build_indexes otherwise than compress\(\)"):
        encode(model, picture()[0])


class OwnIndexes(GaussianConditional):
    """Chooses its CDFs in a way of its own."""

    def build_indexes(self, scales: Tensor) -> Tensor:
        indexes: Tensor = super().build_indexes(2 * scales)
        return indexes


def test_an_entropy_model_of_the_users_own_is_checked_and_said_not_to_be_guarded() -> None:
    model = slices()
    model.gaussian_conditional.__class__ = OwnIndexes
    with pytest.raises(FmpqError, match=r"'gaussian_conditional' \(OwnIndexes\)"):
        encode(model, picture()[0], robust="guarded")
    with pytest.warns(UserWarning, match="may be decoded as an error"):
        data = encode(model, picture()[0])
    assert decode(model, data).shape == (3, 64, 64)
    assert not isinstance(model.gaussian_conditional, GaussianMixtureConditional)


def test_a_file_that_was_guarded_by_another_encoder_is_an_error() -> None:
    codec, x = stock("mean-scale hyperprior"), picture()
    with torch.no_grad():
        coded = guarded.compress(codec, x)
        guard = Guard.from_bytes(coded.guard, MOST)
        for forged in (
            replace(guard, checksum=guard.checksum ^ 1),
            replace(guard, shifts=guard.shifts[:-1]),
            replace(guard, shifts=(*guard.shifts, 0)),
        ):
            with pytest.raises(FmpqError):
                guarded.decompress(codec, replace(coded, guard=forged.to_bytes()), MOST)


def test_a_margin_that_float32_does_not_hold_is_the_same_for_the_decoder() -> None:
    """Blocks are as long as the margin says, and this one lies between two lengths."""
    margin = 1 / (16 * 63.5)
    codec, x = stock("mean-scale hyperprior"), picture()
    with torch.no_grad():
        coded = guarded.compress(codec, x, margin=margin)
        assert torch.isfinite(guarded.decompress(codec, coded, MOST)).all()
    writer = GuardWriter(margin, frozenset())
    writer.indexes(GaussianConditional([0.11, 0.5, 64.0]), torch.full((64 * 63,), 0.3))
    again = Guard.from_bytes(writer.guard.to_bytes(), MOST)
    assert (again.block, again.step) == (writer.guard.block, writer.guard.step)
