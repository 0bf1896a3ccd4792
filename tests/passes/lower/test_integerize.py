"""What is coded under one setting decodes under every other: threads, libraries, layouts, batches, types."""

import copy
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fmpq_fx
from fmpq_fx.coding.arithmetic import default_dtype
from fmpq_fx.exact import ExactLayer
from fmpq_fx.exact.fixed_point import from_integers, to_integers
from fmpq_fx.passes.lower.entropy_path import entropy_path
from support.coded_models import CODED, WAYS_TO_CODE, codec, latents, lively, quantized

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # torch's, of its own flags
QUICK = ("scale hyperprior", "mean-scale hyperprior")
each_coded = pytest.mark.parametrize("name", CODED)
each_way_to_code = pytest.mark.parametrize("name", WAYS_TO_CODE)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
SETTINGS = (
    *("1 thread", "2 threads", "3 threads", "no oneDNN", "products in bfloat16"),
    *("channels last", "contiguous", "float64", "float64 by default", "one by one", "autocast"),
)


FEWER_SETTINGS = ("2 threads", "no oneDNN", "channels last", "float64", "one by one", "autocast")


@contextmanager
def narrow_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def setting(which: str, codec: Any) -> Iterator[Any]:
    """Give the codec to use in the block: ``codec`` itself, unless the setting changes its tensors."""
    if which.endswith(("thread", "threads")):
        with threads(int(which[0])):
            yield codec
    elif which == "no oneDNN":
        with torch.backends.mkldnn.flags(enabled=False):
            yield codec
    elif which == "products in bfloat16":
        with narrow_products():
            yield codec
    elif which == "float64 by default":
        with default_dtype(torch.float64):
            yield codec
    elif which == "float64":
        with default_dtype(torch.float64):
            yield copy.deepcopy(codec).double()
    elif which == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield codec
    elif which in LAYOUTS:
        yield copy.deepcopy(codec).to(memory_format=LAYOUTS[which])
    else:
        yield codec


def encoded(codec: Any, which: str, x: Tensor) -> dict[str, Any]:
    x = x.to(next(codec.parameters()).dtype)
    if which in LAYOUTS:
        x = x.contiguous(memory_format=LAYOUTS[which])
    with torch.no_grad():
        coded: dict[str, Any] = codec.compress(x)
        if which == "one by one":
            parts = [codec.compress(image)["strings"] for image in x.split(1)]
            coded["strings"] = [[string for (string,) in strings] for strings in zip(*parts, strict=True)]
    return coded


def decoded(codec: Any, which: str, coded: dict[str, Any]) -> Tensor:
    if which != "one by one":
        return latents(codec, coded)
    parts = [[[string] for string in image] for image in zip(*coded["strings"], strict=True)]
    return torch.cat([latents(codec, {**coded, "strings": part}) for part in parts])


@pytest.mark.filterwarnings("error:a string does not end with its last symbol")
@each_way_to_code
def test_every_setting_decodes_what_every_other_encoded(name: str) -> None:
    x = lively(name)[1][:, :, :64, :64]
    settings = SETTINGS if name in QUICK else FEWER_SETTINGS
    coded = encoded(codec(name), "", x)
    values = expected = latents(codec(name), coded)
    for which in (*settings, settings[0]):
        # What one other setting encoded will do: without any setting, what each encoded is decoded below.
        with setting(which, codec(name)) as twin:
            assert torch.equal(decoded(twin, which, coded), expected), which
            coded = encoded(twin, which, x)
        expected = latents(codec(name), coded)
    assert values.abs().max() > 3, "images that say something"
    assert torch.equal(values, from_integers(to_integers(values), torch.float64)), "fixed-point numbers"


@each_way_to_code
def test_images_padded_in_any_way_decode_in_any_type(name: str) -> None:
    image = lively(name)[1][0, :, :40, :100].clamp(0, 1)
    for stride in (64, 128):
        x = torch.nn.functional.pad(image[None], (0, 128 - 100, 0, stride - 40))
        coded = encoded(codec(name), "", x)
        wide = copy.deepcopy(codec(name)).double()
        assert torch.equal(decoded(wide, "", coded), latents(codec(name), coded))


@each_way_to_code
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_the_latents_are_the_encoders_and_cost_what_float_ones_do(
    name: str, activation_bits: int | None
) -> None:
    _, x = lively(name)
    exact, floating = (
        codec(name, activation_bits),
        fmpq_fx.convert(quantized(name, activation_bits), exact=False),
    )
    with torch.no_grad():
        y = exact.g_a(x)
        coded, other = encoded(exact, "", x), encoded(floating, "", x)
    values = latents(exact, coded)
    assert (values - y).abs().max() < 0.501, "rounded to the next symbol, in the place where it belongs"
    sizes = [sum(len(string) for group in c["strings"] for string in group) for c in (coded, other)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_a_codec_is_pickled_with_its_own_coding_loops() -> None:
    _, x = lively("mbt2018")
    twin = pickle.loads(pickle.dumps(codec("mbt2018")))
    assert type(twin) is type(codec("mbt2018"))
    assert torch.equal(latents(twin, encoded(twin, "", x)), latents(codec("mbt2018"), encoded(twin, "", x)))


@each_coded
def test_the_path_is_all_that_lies_between_latents_and_cdfs(name: str) -> None:
    path = entropy_path(quantized(name))
    assert not path.obstacles
    assert path.in_order == (name in ("mbt2018", "cheng2020-anchor"))
    networks = ("h_s", "context_prediction", "entropy_parameters", "channel_context")
    expected = {
        site.name
        for site in fmpq_fx.plan_of(quantized(name)).sites
        if any(part in networks for part in site.name.split("."))
    }
    assert set(path.layers) == expected
    exact = {n for n, module in codec(name).named_modules() if isinstance(module, ExactLayer)}
    assert exact == expected


@each_way_to_code
def test_forward_is_that_of_the_graph_up_to_rounding(name: str) -> None:
    _, x = lively(name)
    with torch.no_grad():
        found, expected = codec(name, None)(x), quantized(name, None)(x)
    for key, likelihoods in expected["likelihoods"].items():
        bits = [values.log2().sum().neg() for values in (found["likelihoods"][key], likelihoods)]
        torch.testing.assert_close(*bits, rtol=1e-3, atol=0)
    differing = (found["x_hat"] - expected["x_hat"]).abs() > 1e-2 * expected["x_hat"].abs().max()
    assert differing.float().mean() < 0.02, "where a latent was rounded the other way, and near it"


def test_what_is_trained_is_what_codes() -> None:
    # With the plan's 8-bit inputs, rounding to fixed point is all that differs from the fake-quantized network. Where
    # it moves a value across a rounding boundary of the next layer, that is a step there, so not all are that close.
    exact = codec("mean-scale hyperprior")
    trained: Any = fmpq_fx.convert(quantized("mean-scale hyperprior"), exact=False)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    z_hat = from_integers(to_integers(5 * noise), torch.float32)
    with torch.no_grad():
        expected = trained.h_s(z_hat)
        difference = exact.h_s(z_hat) - expected
    assert difference.norm() < 2e-3 * expected.norm()  # it is 1e-3 or a little less, whatever the latents


@pytest.mark.parametrize("name", ["mean-scale hyperprior", "cheng2020-checkerboard"])
def test_a_model_in_bfloat16_codes(name: str) -> None:
    _, x = lively(name)
    small = copy.deepcopy(codec(name)).bfloat16()
    coded = encoded(small, "", x)
    assert torch.equal(decoded(small, "one by one", coded), latents(small, coded))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_bits() -> None:
    layers = codec("mean-scale hyperprior").h_s[:2]
    x = from_integers(to_integers(5 * torch.randn(1, 8, 4, 4)), torch.float32)
    assert torch.equal(torch.compile(layers)(x), layers(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_coded
def test_cpu_and_gpu_decode_each_others_strings(name: str) -> None:
    _, x = lively(name)
    gpu = copy.deepcopy(codec(name)).cuda()
    coded = encoded(codec(name), "", x)
    assert torch.equal(latents(gpu, coded).cpu(), latents(codec(name), coded))
    with torch.no_grad():
        coded = gpu.compress(x.cuda())
    assert torch.equal(latents(gpu, coded).cpu(), latents(codec(name), coded))
