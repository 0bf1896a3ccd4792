"""Transforms in tiles, against the same in one piece."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fmpq_fx.coding.footprint import peak_bytes
from fmpq_fx.coding.tiles import Tiled, Transform
from fmpq_fx.exact import ExactLayer
from support.random_graphs import random_module
from support.traced_models import PLAIN, Make, each_model, lively


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


@torch.no_grad()
def check(module: nn.Module, x: Tensor, part: float = 0.0, tolerance: float = 0.0) -> int:
    """Compare ``module`` on ``x`` with its tiles within ``part`` of the memory, and return how many there were."""
    transform = Transform(module)
    assert transform.obstacle == ""
    budget = int(part * transform.peak(x, (x.size(-2), x.size(-1))))
    expected, before = module(x.clone()), x.clone()
    found = Tiled(transform, module, budget)(x)
    assert torch.equal(x, before)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    grid = transform.grid(x, budget)
    assert grid.peak <= budget or not part
    return len(grid.rows) * len(grid.columns)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [(23, 38), (1, 40)])
def test_random_graphs_in_the_smallest_tiles(seed: int, size: tuple[int, int]) -> None:
    module = random_module(seed).double()
    x = noise(1, 4, *size, dtype=torch.float64)
    try:
        module(x)
    except RuntimeError:
        pytest.skip("too small for that graph")
    check(module, x, tolerance=1e-12)


@each_model
@pytest.mark.parametrize("size", [(40, 70), (1, 100)])
def test_the_zoo_in_tiles_smaller_than_the_overlap(make: Make, size: tuple[int, int]) -> None:
    model = lively(make)
    check(model.g_a, noise(1, 3, *size), tolerance=1e-5)  # type: ignore[arg-type]
    latents = model.g_a(noise(1, 3, *size)).detach()  # type: ignore[operator]
    check(model.g_s, latents, tolerance=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [0.5, 0.25])
def test_larger_tiles_of_a_batch(part: float) -> None:
    model = lively(PLAIN["scale hyperprior"])
    assert check(model.g_a, noise(2, 3, 330, 420), part, 1e-5) > 1  # type: ignore[arg-type]
    assert check(model.g_s, noise(2, 12, 21, 27), part, 1e-5) > 1  # type: ignore[arg-type]


def test_what_fits_runs_as_a_whole() -> None:
    seen: list[torch.Size] = []
    layer = nn.Conv2d(3, 3, 3)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    Tiled(Transform(layer), layer, 10**9)(input=noise(1, 3, 20, 20))
    assert seen == [(1, 3, 20, 20)]


def test_exact_layers_in_tiles_give_the_same_bits() -> None:
    torch.manual_seed(0)
    for layer in (nn.Conv2d(6, 8, 5, 2, 2), nn.ConvTranspose2d(6, 8, 5, 2, 2, 1), nn.Conv2d(6, 8, 1)):
        assert check(ExactLayer(layer), 10 * noise(1, 6, 20, 31), 0.3) > 1


def test_a_module_that_writes_to_its_input() -> None:
    """Where tiles overlap, what one of them wrote must not be seen by the next."""

    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            x += x
            out: Tensor = self.conv(x)
            return out

    check(Doubles(), noise(1, 1, 64, 3), tolerance=1e-6)


def test_a_module_without_known_reach_says_why() -> None:
    transform = Transform(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1)))
    assert "'1' (AdaptiveAvgPool2d) sees more than a neighbourhood" in transform.obstacle
    branching = Transform(nn.MultiheadAttention(4, 1))
    assert "it cannot be traced" in branching.obstacle


def test_memory_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 3, 2, 1, bias=False))
    before = copy.deepcopy(model.state_dict())
    peak, shape = peak_bytes(model, (1, 3, 32, 48), torch.float32)
    assert shape == (1, 2, 16, 24)
    pixels = 32 * 48
    # In the second convolution: the image, what it reads, a copy of that in another layout, and what it returns.
    assert peak == 4 * ((3 + 8 + 8) * pixels + 2 * pixels // 4)
    assert peak_bytes(model, (1, 3, 64, 48), torch.float32)[0] == 2 * peak
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    columns = 8 * 9 * pixels // 4  # what float64 is multiplied as
    expected = 8 * ((3 + 8) * pixels + 2 * pixels // 4 + columns)
    assert peak_bytes(model.double(), (1, 3, 32, 48), torch.float64)[0] == expected


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_columns_of_a_transposed_convolution_in_float64(kernel: int) -> None:
    layer = nn.ConvTranspose2d(2, 6, kernel).double()
    extra = 8 * math.prod((6, kernel, kernel, 10, 10))
    out = 6 * (10 + kernel - 1) ** 2
    assert peak_bytes(layer, (1, 2, 10, 10), torch.float64)[0] == extra + 8 * (200 + out)
