"""Codecs within a stated memory: the same bits as without, or an error that says what is needed."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError, memory
from fmpq_fx.coding import tiling
from fmpq_fx.coding.codec import codec_of, with_settings
from fmpq_fx.coding.fmi import decode, encode
from support import coded_models
from support.hyperpriors import hyperprior_of
from support.small_models import small_model
from support.traced_models import Codec, Make, each_model

SIZE = (180, 200)


def picture(height: int = SIZE[0], width: int = SIZE[1]) -> Tensor:
    coarse = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(2))
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def ready(model: Any) -> nn.Module:
    model.update(force=True)
    return model.eval()  # type: ignore[no-any-return]


def least(codec: nn.Module, size: tuple[int, int] = (192, 256), images: int = 3) -> str:
    """Return the memory that the error asks for."""
    with pytest.raises(FmpqError, match=r"needs about .* of memory, and may take 1 kB") as error:
        tiling.within(codec_of(codec), size, 1000, images=images)
    found = re.search(r"about (.*) of memory", str(error.value))
    assert found is not None
    return found[1]


@contextmanager
def watched(codec: nn.Module) -> Iterator[list[torch.Size]]:
    """Within the block, note the shapes of what the analysis and the synthesis of ``codec`` run on."""
    shapes: list[torch.Size] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
        for module in (codec.get_submodule("g_a"), codec.get_submodule("g_s"))
    ]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018"])
def test_bitstreams_are_the_same_within_the_memory_that_the_error_asks_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)  # so that as many tiles as can be are needed
    codec, image = coded_models.codec(name), picture()
    state = {key: value.clone() for key, value in codec.state_dict().items()}
    whole = encode(codec, image)
    with watched(codec) as shapes:
        assert encode(codec, image) == whole
        reference = decode(codec, whole)
        assert len(shapes) == 2
        needed = int(1.2 * memory.bytes_of(least(codec)))  # with no more than that, tiles are many and small
        shapes.clear()
        in_tiles = encode(codec, image, memory=needed)
        assert len(shapes) > 1
        shapes.clear()
        found = decode(codec, in_tiles, memory=needed)
        assert len(shapes) > 1
    assert in_tiles == whole
    assert (found - reference).abs().max() < 1e-4
    assert all(torch.equal(value, state[key]) for key, value in codec.state_dict().items())


class Negative(nn.Module):
    """What another backend might be: it notes what it is asked for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.shapes = module, list[torch.Size]()

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        out: Tensor = self.module(-x)
        return out


def test_whatever_runs_a_transform_runs_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)
    model: Any = ready(small_model("mbt2018-mean"))
    backend = Negative(model.g_a)
    codec = with_settings(codec_of(model), backend={"g_a": backend})
    whole = encode(codec, -picture() + 1)
    assert backend.shapes == [(1, 3, 192, 256)]
    backend.shapes.clear()
    assert encode(codec, -picture() + 1, memory=least(model)) == whole
    assert len(backend.shapes) > 4
    assert (1, 3, 192, 256) not in backend.shapes


@each_model
def test_both_ends_of_every_model_are_found_and_local(make: Make) -> None:
    model = make()
    tiled = tiling.within(codec_of(model), (640, 1024), "20MB", images=0)
    assert list(tiled.fmpq.tiles) == ["g_a", "g_s"]
    latents: Any = model.get_submodule("g_a")(torch.zeros(1, 3, 640, 1024))
    assert tiling.latents_of(codec_of(model), (640, 1024)) == latents.numel()


def test_evaluate_within_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)
    model, images = fmpq_fx.samples.model(), {"one": picture()}
    needed = int(1.2 * memory.bytes_of(least(model, images=5)))
    whole, found = fmpq_fx.evaluate(model, images), fmpq_fx.evaluate(model, images, memory=needed)
    (ours,), (theirs,) = found.images, whole.images
    assert (ours.bpp, ours.deviation) == (theirs.bpp, theirs.deviation)
    assert ours.psnr == pytest.approx(theirs.psnr, abs=1e-3)
    assert ours.ms_ssim == pytest.approx(theirs.ms_ssim, abs=1e-5)


class Excited(nn.Module):
    """Multiplies by what the mean of the whole image says."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.pool(x).sigmoid()
        return out


def test_what_cannot_be_tiled_is_named_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_model("bmshj2018-hyperprior")
    model.g_s[1] = Excited()
    codec = ready(model)
    with pytest.raises(
        FmpqError,
        match=r"256 x 192.*\('g_s' runs as a whole: '1.pool' \(AdaptiveAvgPool2d\) sees more",
    ):
        encode(codec, picture(), memory="1MB")
    needed = least(codec)
    data = encode(codec, picture(), memory=needed)
    assert data == encode(codec, picture())
    monkeypatch.setattr(memory, "_physical", lambda device: 4 * 10**6)  # the default only warns
    with pytest.warns(UserWarning, match=r"needs about .*'g_s' runs as a whole"):
        assert encode(codec, picture()) == data


class Flat(Codec):
    """A codec whose transforms are no modules."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return super().forward(self.relu(x))

    def compress(self, x: Tensor) -> dict[str, Any]:
        return {"strings": self.prior.compress(x), "shape": x.shape[2:]}

    decompress = compress


def test_a_codec_without_modules_for_its_transforms() -> None:
    with pytest.raises(FmpqError, match=r"unknown amount of memory.*no module that takes an image"):
        encode(Flat(), picture(), memory="1MB")


def test_latents_of_another_size_than_the_image_are_refused() -> None:
    codec = ready(small_model("bmshj2018-hyperprior"))
    small, large = encode(codec, picture(64, 64)), encode(codec, picture(128, 64))
    sizes = slice(17, 25)  # after the head and the fingerprint
    body = large[9:17] + small[sizes] + large[25:]
    forged = large[:5] + zlib.crc32(body).to_bytes(4, "big") + body
    with pytest.raises(FmpqError, match="not those of an image of 64 x 64 pixels"):
        decode(codec, forged)


def test_a_transform_that_was_exchanged_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)
    model: Any = ready(small_model("bmshj2018-hyperprior"))
    codec: Any = codec_of(model)
    encode(codec, picture(), memory=least(codec))
    codec.g_s[1] = Excited()
    with pytest.raises(FmpqError, match="'g_s' runs as a whole"):
        encode(codec, picture(), memory="1MB")


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_in_tiles(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)
    model = hyperprior_of(channels)
    image = picture().mean(0, keepdim=True).repeat(channels, 1, 1)
    gm = coded_models.graph_of(model, image[None, :, :64, :64])
    codec = fmpq_fx.convert(gm, exact="require")
    whole = encode(codec, image)
    needed = int(1.2 * memory.bytes_of(least(codec)))
    with watched(codec) as shapes:
        assert encode(codec, image, memory=needed) == whole
        found = decode(codec, whole, memory=needed)
    assert len(shapes) > 4
    assert {shape[1] for shape in shapes} == {channels, 12}
    assert found.shape == image.shape
    assert (found - decode(codec, whole)).abs().max() < 1e-4
