"""Codecs within a stated memory: the same bits as without, or an error that says what is needed."""

import re
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmpq_fx
from conftest import small_model
from fmpq_fx import FmpqError, memory
from fmpq_fx.coding import tiling
from fmpq_fx.coding.fmi import decode, encode
from fmpq_fx.coding.tiles import TiledForward
from support import coded_models
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
        tiling.within(codec, size, 1000, images=images)
    found = re.search(r"about (.*) of memory", str(error.value))
    assert found is not None
    return found[1]


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many tiles each run in tiles had."""
    counts: list[int] = []
    original = TiledForward.__call__

    def call(self: TiledForward, x: Tensor) -> Tensor:
        runs, forward = [], self.forward
        self.forward = lambda tile: (runs.append(tile), forward(tile))[1]  # type: ignore[func-returns-value]
        try:
            return original(self, x)
        finally:
            self.forward = forward
            counts.append(len(runs))

    monkeypatch.setattr(TiledForward, "__call__", call)
    return counts


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018"])
def test_bitstreams_are_the_same_within_the_memory_that_the_error_asks_for(
    name: str, tiles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)  # so that as many tiles as can be are needed
    codec, image = coded_models.codec(name), picture()
    whole = encode(codec, image)
    assert not tiles
    state = {key: value.clone() for key, value in codec.state_dict().items()}
    needed = int(1.2 * memory.bytes_of(least(codec)))  # with no more than that, tiles are many and small
    in_tiles = encode(codec, image, memory=needed)
    assert max(tiles) > 1
    tiles.clear()
    assert in_tiles == whole
    reference = decode(codec, whole)
    assert not tiles
    found = decode(codec, in_tiles, memory=needed)
    assert max(tiles) > 1
    assert (found - reference).abs().max() < 1e-4
    assert all("forward" not in module.__dict__ for module in codec.modules())
    assert all(torch.equal(value, state[key]) for key, value in codec.state_dict().items())


def test_whatever_runs_a_transform_runs_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a backend does that takes the place of a module's forward."""
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)
    codec: Any = ready(small_model("mbt2018-mean"))
    whole = encode(codec, picture())
    shapes, own = [], codec.g_a.forward
    codec.g_a.forward = lambda x: (shapes.append(x.shape), own(x))[1]  # type: ignore[func-returns-value]
    assert encode(codec, picture(), memory=least(codec)) == whole
    assert len(shapes) > 4
    assert (1, 3, 192, 256) not in shapes


@each_model
def test_both_ends_of_every_model_are_found_and_local(make: Make) -> None:
    model = make()
    ends = tiling._ends(model, (640, 1024))
    assert [end.name for end in ends] == ["g_a", "g_s"]
    assert [end.transform.obstacle for end in ends] == ["", ""]
    latents: Any = model.get_submodule("g_a")(torch.zeros(1, 3, 64, 128))
    assert ends[0].like.shape == (1, 3, 640, 1024)
    assert ends[1].like.shape == (1, latents.size(1), 40, 64)


def test_evaluate_within_a_memory(tiles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "LATENT_BYTES", 0)
    model, images = fmpq_fx.samples.model(), {"one": picture()}
    whole = fmpq_fx.evaluate(model, images)
    assert not tiles
    needed = int(1.2 * memory.bytes_of(least(model, images=5)))
    found = fmpq_fx.evaluate(model, images, memory=needed)
    assert max(tiles) > 1
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


def test_a_codec_without_modules_for_its_transforms() -> None:
    with pytest.raises(FmpqError, match=r"unknown amount of memory.*no module that takes an image"):
        tiling.within(Flat(), (640, 640), "1MB", images=1)


def test_a_small_image_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_ends", lambda *_: pytest.fail("it was"))
    codec = ready(small_model("mbt2018-mean"))
    assert tiling.within(codec, (512, 768), "8GB", images=5) is codec


def test_latents_of_another_size_than_the_image_are_refused() -> None:
    codec = ready(small_model("bmshj2018-hyperprior"))
    small, large = encode(codec, picture(64, 64)), encode(codec, picture(128, 64))
    sizes = slice(17, 25)  # after the head and the fingerprint
    body = large[9:17] + small[sizes] + large[25:]
    forged = large[:5] + zlib.crc32(body).to_bytes(4, "big") + body
    with pytest.raises(FmpqError, match="not those of an image of 64 x 64 pixels"):
        decode(codec, forged)
