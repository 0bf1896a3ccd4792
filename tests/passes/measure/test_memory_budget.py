"""Measurements within a budget: never more is kept, and nothing of the result depends on it."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx.passes.clip.descent import choose
from fmpq_fx.passes.measure import bench
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.measure.changes import Change, ChangeMeter
from fmpq_fx.passes.measure.kept_values import Budget, KeptValues
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import quantize_layer, quantized_layers
from fmpq_fx.rd import rd_sums
from support.small_models import small_model


@pytest.fixture
def images(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Five images in two batches, which are run in pieces of two, one, and two."""
    monkeypatch.setattr(bench, "PIECE_PIXELS", {"cpu": 2 * 64 * 64})
    return [torch.cat((x, x[:1].flip(-1))), x.flip(-2)]


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Let the garbage collector see the objects of the test alone; those of all the libraries take it seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def bytes_of_tensors() -> int:
    """Return how many bytes the tensors have that are alive and that the garbage collector sees."""
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def traced(model: nn.Module) -> fx.GraphModule:
    gm = trace(model)
    find_sites(gm)
    return gm


def changes_of(gm: fx.GraphModule) -> dict[tuple[str, int], Change]:
    return {(s.name, b): {s.name: partial(quantize_layer, bits=b)} for s in find_sites(gm) for b in (3,)}


def least_memory(gm: fx.GraphModule, images: list[Tensor]) -> int:
    """Return the least budget that suffices, which the message of the error says."""
    with pytest.raises(
        ValueError, match=r"memory=1 .* is too little: what '.*' reads for \d images"
    ) as error:
        ChangeMeter(gm, make_bench(gm, images, memory=1)).measure_base()
    words = str(error.value).split()
    return int(words[words.index("bytes;") - 1])


@pytest.mark.usefixtures("only_new_objects")
def test_every_budget_is_kept_to_and_gives_the_same_bits(model: nn.Module, images: list[Tensor]) -> None:
    gm = traced(model)
    before = bytes_of_tensors()
    meter = ChangeMeter(gm, make_bench(gm, images))
    expected = meter.measure(changes_of(gm))
    everything, least = bytes_of_tensors() - before, least_memory(gm, images)
    base = meter.measure_base()
    del meter
    assert least < everything / 3
    for memory in (least, everything // 2):
        before = bytes_of_tensors()
        small = ChangeMeter(gm, make_bench(gm, images, memory=memory))
        own = sum(x.nbytes for x in small.bench.pieces)  # copies of the images, in another layout
        assert small.measure_base() == base
        assert bytes_of_tensors() - before - own <= memory
        assert small.measure(changes_of(gm)) == expected
        assert 0 < bytes_of_tensors() - before - own <= memory
        del small
    with pytest.raises(ValueError, match="too little"):
        ChangeMeter(gm, make_bench(gm, images, memory=least - 1)).measure_base()


def test_prepare_chooses_the_same_within_the_least_memory(images: list[Tensor]) -> None:
    model = small_model("bmshj2018-hyperprior")
    least = least_memory(traced(model), images)
    small = fmpq_fx.prepare(model, 0.15, calibration=images, bits=(3, 6), memory=least)
    large = fmpq_fx.prepare(model, 0.15, calibration=images, bits=(3, 6), memory="1GB")
    assert fmpq_fx.plan_of(small) == fmpq_fx.plan_of(large)


def test_a_result_does_not_depend_on_what_else_is_asked_for(images: list[Tensor]) -> None:
    gm = traced(small_model("mbt2018-mean"))
    changes = changes_of(gm)
    together = ChangeMeter(gm, make_bench(gm, images)).measure(changes)
    assert list(together) == list(changes)
    meter = ChangeMeter(gm, make_bench(gm, images, memory=2 * least_memory(gm, images)))
    for key in reversed(changes):  # against the order of the graph, one at a time
        assert meter.measure({key: changes[key]}) == {key: together[key]}


def test_what_was_begun_on_the_first_piece_goes_on_to_the_same_bits(images: list[Tensor]) -> None:
    gm = traced(small_model("bmshj2018-hyperprior"))
    changes = changes_of(gm)
    at_once = ChangeMeter(gm, make_bench(gm, images)).measure(changes)
    meter = ChangeMeter(gm, make_bench(gm, images))
    assert len(meter.bench.pieces) > 1
    first = meter.measure(changes, begin=True)
    alone = ChangeMeter(gm, replace(meter.bench, pieces=meter.bench.pieces[:1]))
    assert first == alone.measure(changes)
    assert meter.measure_first_base() == alone.measure_base()
    assert meter.measure(changes) == at_once


def test_pieces_of_a_batch_add_up_to_it(model: nn.Module, images: list[Tensor]) -> None:
    # Kernels for fewer images round otherwise; in double precision, no latent is close enough to a tie for that.
    gm, images = traced(model.double()), [image.double() for image in images]
    assert [len(piece) for piece in bench.cut_into_pieces(images)] == [2, 1, 2]
    with torch.no_grad():
        sums = [rd_sums(gm(x), x) for x in images]
    base = ChangeMeter(gm, make_bench(gm, images)).measure_base()
    total = sums[0] + sums[1]
    assert (base.pixels, base.count) == (total.pixels, total.count)
    assert base.bits == pytest.approx(total.bits, rel=1e-9)
    assert base.error == pytest.approx(total.error, rel=1e-9)


def test_what_was_chosen_is_what_was_measured(images: list[Tensor]) -> None:
    # The descent computes values anew only where it needs them; a stale one would show as another RD loss.
    model = small_model("mbt2018")
    gm = fmpq_fx.prepare(
        model, 3 / 32, calibration=images, bits=[3], planner="uniform", lmbda=0.01, activation_bits=None
    )
    layers, own = quantized_layers(gm), make_bench(gm, images)
    for layer in layers.values():
        layer.set_clip(1.0)
    for clips in ((1.0, 0.9), (1.0, 0.9, 0.8, 0.7)):
        setters = {site: layer.set_clip for site, layer in layers.items()}
        chosen, rd = choose(gm, own, 0.01, setters, clips, "clips")
        assert len(set(chosen.values())) > 1, "some are clipped, and some are not"
        assert rd == pytest.approx(mean_rd(gm, own, 0.01), rel=1e-12)
        for site, layer in layers.items():
            alike = quantize_layer(layer.layer, 3, clip=chosen[site])
            assert torch.equal(layer.weight_quantizer.log_scale, alike.weight_quantizer.log_scale)
            assert layer.kept_weight is None
            layer.set_clip(1.0)


def test_a_model_that_cannot_run_with_channels_last(x: Tensor) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = small_model("bmshj2018-hyperprior")

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.inner.g_a(x)
            y = y.view(y.size(0), -1).view(y.size(0), 12, 4, 4)
            y_hat, likelihoods = self.inner.entropy_bottleneck(y[:, :8])
            return {
                "x_hat": self.inner.g_s(torch.cat((y_hat, y[:, 8:]), 1)),
                "likelihoods": {"y": likelihoods},
            }

    model = Viewing()
    with pytest.raises(RuntimeError, match="view"):
        model(x.contiguous(memory_format=torch.channels_last))
    table = fmpq_fx.analyze(model, calibration=x, bits=[4])
    assert any(values[4] for values in table.raw.values())


def test_too_little_memory_while_the_layout_is_tried_says_nothing_of_the_layout(x: Tensor) -> None:
    def hungry(x: Tensor) -> None:
        torch.empty(2**58)

    with pytest.raises(RuntimeError, match="allocate"):
        make_bench(hungry, [x])  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 5), st.integers(1, 20)), max_size=30)
)
def test_no_more_is_kept_than_the_budget_allows(steps: list[tuple[bool, int, int, int]]) -> None:
    graph, budget = fx.Graph(), Budget(160, shares=2)
    nodes = [graph.placeholder(f"x{i}") for i in range(6)]
    stores = [KeptValues(budget), KeptValues(budget)]
    for demanded, store, node, size in steps:
        value = torch.zeros(size)  # 4 bytes each
        if demanded:
            stores[store].demand({nodes[node]: value}, "a value")
            assert stores[store].values[nodes[node]] is value
        else:
            stores[store].offer(nodes[node], value)
        kept = [value for each in stores for value in each.values.values()]
        assert sum(value.nbytes for value in kept) == budget.held <= 160


def test_small_values_stay_and_large_ones_make_room() -> None:
    nodes = [fx.Graph().placeholder(name) for name in "abc"]
    store = KeptValues(Budget(100))
    store.offer(nodes[0], torch.zeros(20))  # 80 bytes
    store.offer(nodes[1], torch.zeros(10))
    assert list(store.values) == nodes[1:2]
    store.offer(nodes[2], torch.zeros(16))
    assert list(store.values) == nodes[1:2]  # no room, and the smaller one does not make any
    store.demand({nodes[2]: torch.zeros(16)}, "c")
    assert list(store.values) == nodes[2:]
    assert store.held == 64


@pytest.mark.parametrize("memory", [0, -1, "", "GB", "2 gigs", "-1GB", "0MB", 1.5, True])
def test_memory_that_is_no_number_of_bytes(memory: int, x: Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="memory is"):
        fmpq_fx.prepare(small_model("bmshj2018-hyperprior"), 0.2, calibration=x, memory=memory)
