"""What graphs see, against what changes when one row or column of the input does."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from compressai.layers import GDN, AttentionBlock, MaskedConv2d, ResidualBlockUpsample
from torch import Tensor, fx, nn

from fmpq_fx import FmpqError
from fmpq_fx.exact import ExactLayer
from fmpq_fx.passes.receptive_field import Reach, layer_reach, receptive_field
from fmpq_fx.passes.tracing.leaves import NetworkTracer
from fmpq_fx.quant import quantize_layer
from support.random_graphs import random_module
from support.traced_models import each_model

SIDE = 31  # of the inputs: an odd number, which strides do not divide


def traced(module: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(module, NetworkTracer().trace(module))


def seen(module: nn.Module, axis: int) -> list[set[int]]:
    """Return for each output place of an axis the inputs that it sees, as a NaN there shows.

    In float64, since float32 convolutions may mix a whole block of inputs.
    """
    found: list[set[int]] = []
    for place in range(SIDE):
        x = torch.zeros(1, 4, SIDE, SIDE, dtype=torch.float64)
        x.narrow(axis, place, 1).fill_(torch.nan)
        with torch.no_grad():
            out = module.double()(x)
        changed = out.isnan().transpose(axis, 3).flatten(0, 2).any(0).tolist()
        found = found or [set() for _ in changed]
        for inputs, is_changed in zip(found, changed, strict=True):
            inputs |= {place} if is_changed else set()
    return found


def check(module: nn.Module, slack: int = 0) -> None:
    """Compare with what ``module`` really sees; ``slack`` inputs more are allowed on either side."""
    for axis, reach in zip((2, 3), receptive_field(traced(module)), strict=True):
        for place, inputs in enumerate(seen(module, axis)):
            low, high = reach.inputs(place, place)
            said = set(range(max(0, low), min(SIDE, high + 1)))
            assert inputs <= said, (module, axis, place)
            if inputs and low >= 0 and high < SIDE:
                assert min(inputs) - low <= slack, (module, axis, place)
                assert high - max(inputs) <= slack, (module, axis, place)


@pytest.mark.parametrize("seed", range(16))
def test_random_graphs(seed: int) -> None:
    check(
        random_module(seed), slack=3
    )  # transposed convolutions see every other input, and fewer at some places


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 5, 2, 2),
        nn.Conv2d(4, 4, 3, 1, 2, 2),
        nn.Conv2d(4, 4, 4, 2, 1, padding_mode="replicate"),
        nn.Conv2d(4, 4, 4, padding="same"),
        nn.PixelUnshuffle(1),
        nn.ZeroPad2d((1, 2, 3, 0)),
        nn.MaxPool2d(3, 2, 1),
        GDN(4),
    ],
    ids=str,
)
def test_single_layers_to_the_place(layer: nn.Module) -> None:
    check(nn.Sequential(layer))


def test_a_transposed_convolution_to_the_place() -> None:
    check(nn.Sequential(nn.ConvTranspose2d(4, 4, 5, 2, 2, 1)))


@pytest.mark.parametrize(
    "block", [AttentionBlock(4), ResidualBlockUpsample(4, 4)], ids=["attention", "upsample"]
)
def test_blocks_of_the_zoo(block: nn.Module) -> None:
    check(block.eval(), slack=1)


def test_layers_that_are_quantized_or_exact_see_what_the_float_layer_sees() -> None:
    for layer in (
        nn.Conv2d(4, 4, 5, 2, 1),
        nn.ConvTranspose2d(4, 4, 5, 2, 2, 1),
        MaskedConv2d(4, 4, 5, padding=2),
    ):
        expected = layer_reach(layer)
        assert layer_reach(quantize_layer(layer, 8, 8)) == expected
        assert layer_reach(ExactLayer(layer)) == expected


@each_model
def test_the_zoo_by_hand(make: object) -> None:
    model = make()  # type: ignore[operator]
    analysis, _ = receptive_field(traced(model.g_a))
    synthesis, _ = receptive_field(traced(model.g_s))
    assert (analysis.stride, analysis.align) == (16, 16)
    assert (1 / synthesis.stride, synthesis.align) == (16, 1)
    if isinstance(model.g_a[0], nn.Conv2d) and len(model.g_a) == 7:  # four convolutions of 5 x 5, stride 2
        assert (analysis.low, analysis.high) == (-2 - 4 - 8 - 16, 2 + 4 + 8 + 16)


class Forward(nn.Module):
    def __init__(self, function: object):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1)
        self.plane = nn.Parameter(torch.zeros(1, 4, 8, 8))
        self.shift = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.pad(x, (1, 2, 3, 0)),
        lambda m, x: F.pad(F.pad(x, (3, 0), value=1.0), (0, 0, 0, 0, 1, 1))[:, 1:-1],
    ],
    ids=["with zeros", "of columns, and of channels"],
)
def test_padding_to_the_place(function: object) -> None:
    check(Forward(function))


def test_what_is_given_by_name() -> None:
    check(Forward(lambda m, x: torch.cat(tensors=(m.conv(input=x), x), dim=1)))
    check(Forward(lambda m, x: torch.chunk(input=m.conv(input=x), chunks=2, dim=1)[1]))
    check(Forward(lambda m, x: F.pixel_shuffle(input=m.conv(input=x), upscale_factor=2)))


def test_padding_with_what_lies_at_the_border() -> None:
    check(nn.Sequential(nn.ReplicationPad2d((2, 0, 1, 1))), slack=2)
    with pytest.raises(FmpqError, match="ReflectionPad2d"):
        receptive_field(traced(nn.Sequential(nn.ReflectionPad2d(1))))
    check(Forward(lambda m, x: m.conv(F.pad(x, pad=(2, -1, -2, 1), mode="replicate"))), slack=3)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda m, x: m.conv(x) * F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d"),
        (lambda m, x: x - x.mean((2, 3), keepdim=True), "mean"),
        (lambda m, x: torch.softmax(x, -1), "softmax"),
        (lambda m, x: x.flip(3), "flip"),
        (lambda m, x: F.pad(x, (1, 1, 1, 1), "reflect"), "pad"),
        (lambda m, x: F.pad(x, (0, x.size(2))), "a size, which is another one in a part"),
        (lambda m, x: x.flatten(2).transpose(1, 2), "flatten"),
        (lambda m, x: torch.cat((x, x), 2), "cat"),
        (lambda m, x: x.chunk(2, 3)[0], "chunk"),
        (lambda m, x: x[:, :, 1:], "getitem"),
        (lambda m, x: x[0], "getitem"),
        (lambda m, x: x + m.plane, "'plane', which may differ from place to place"),
        (lambda m, x: x + F.max_pool2d(x, 2), "max_pool2d"),
        (lambda m, x: m.conv(x) + nn.functional.pixel_shuffle(x, 2)[:, :1], "several sizes"),
        (lambda m, x: (x, x), "not one tensor"),
        (lambda m, x: m.up(x, output_size=(62, 62)), "'up' .*ConvTranspose2d.* sees more than"),
        (lambda m, x: torch.cat(tensors=(x, x), dim=2), "cat"),
    ],
)
def test_what_sees_everything_is_named(function: object, says: str) -> None:
    with pytest.raises(FmpqError, match=says):
        receptive_field(traced(Forward(function)))


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1)]
)
def test_layers_that_see_everything(layer: nn.Module) -> None:
    with pytest.raises(FmpqError, match=type(layer).__name__):
        receptive_field(traced(nn.Sequential(layer)))
    with pytest.raises(FmpqError, match=type(layer).__name__):
        layer_reach(layer)


def test_constants_of_all_places_are_no_obstacle() -> None:
    found = receptive_field(traced(Forward(lambda m, x: m.conv(x) * m.shift + 2)))
    reach = Reach(low=Fraction(-1), high=Fraction(1))
    assert found == (reach, reach)
