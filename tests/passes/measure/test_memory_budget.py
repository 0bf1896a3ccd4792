"""Measurements within a budget: never more is kept, and nothing of the result depends on it."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fmpq_fx
from conftest import small_model
from fmpq_fx.passes.clip.descent import RDDescent
from fmpq_fx.passes.measure import incremental
from fmpq_fx.passes.measure.incremental import Change, ChangeMeter, mean_rd
from fmpq_fx.passes.measure.kept_values import Budget, KeptValues
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_layers

CPU = torch.device("cpu")


@pytest.fixture
def images(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Five images in two batches, which are run in parts of two, one, and two."""
    monkeypatch.setattr(incremental, "PART_PIXELS", {"cpu": 2 * 64 * 64})
    return [torch.cat((x, x[:1].flip(-1))), x.flip(-2)]


class Peak:
    """The most bytes that were kept at once, counted on the tensors themselves whenever one is added."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = 0
        put = KeptValues._put

        def counting(store: KeptValues, node: fx.Node, value: object, size: int) -> None:
            put(store, node, value, size)
            storages: dict[int, int] = {}
            for each in store._budget.stores:
                fx.node.map_aggregate(list(each.values.values()), partial(note, storages))
            self.bytes = max(self.bytes, sum(storages.values()))

        def note(storages: dict[int, int], leaf: object) -> None:
            if isinstance(leaf, Tensor):
                storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()

        monkeypatch.setattr(KeptValues, "_put", counting)


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Peak:
    return Peak(monkeypatch)


def traced(model: nn.Module) -> fx.GraphModule:
    gm = trace(model)
    find_sites(gm)
    return gm


def changes_of(gm: fx.GraphModule) -> dict[tuple[str, int], Change]:
    return {(s.name, b): (s.name, partial(quantize_layer, bits=b)) for s in find_sites(gm) for b in (3, 8)}


def least_memory(gm: fx.GraphModule, images: list[Tensor]) -> int:
    """Return the least budget that suffices, which the message of the error says."""
    with pytest.raises(
        ValueError, match=r"memory=1 .* is too little: what '.*' reads for \d images"
    ) as error:
        ChangeMeter(gm, images, memory=1)
    words = str(error.value).split()
    return int(words[words.index("bytes;") - 1])


def test_every_budget_is_kept_to_and_gives_the_same_bits(
    model: nn.Module, images: list[Tensor], peak: Peak
) -> None:
    gm = traced(model)
    meter = ChangeMeter(gm, images)
    expected = meter.sums_of(changes_of(gm))
    everything, least = peak.bytes, least_memory(gm, images)
    assert least < everything / 3
    for memory in (least, everything // 2):
        peak.bytes = 0
        small = ChangeMeter(gm, images, memory=memory)
        assert small.base == meter.base
        assert small.sums_of(changes_of(gm)) == expected
        assert 0 < peak.bytes <= memory
    with pytest.raises(ValueError, match="too little"):
        ChangeMeter(gm, images, memory=least - 1)


def test_prepare_chooses_the_same_within_the_least_memory(images: list[Tensor], peak: Peak) -> None:
    model = small_model("bmshj2018-hyperprior")
    least = least_memory(traced(model), images)
    peak.bytes = 0
    small = fmpq_fx.prepare(model, 0.15, calibration=images, bits=(3, 6), memory=least)
    assert 0 < peak.bytes <= least
    large = fmpq_fx.prepare(model, 0.15, calibration=images, bits=(3, 6), memory="1GB")
    assert fmpq_fx.plan_of(small) == fmpq_fx.plan_of(large)


def test_a_result_does_not_depend_on_what_else_is_asked_for(images: list[Tensor]) -> None:
    gm = traced(small_model("mbt2018-mean"))
    changes = changes_of(gm)
    together = ChangeMeter(gm, images).sums_of(changes)
    assert list(together) == list(changes)
    meter = ChangeMeter(gm, images, memory=2 * least_memory(gm, images))
    for key in reversed(changes):  # against the order of the graph, one at a time
        assert meter.sums_of({key: changes[key]}) == {key: together[key]}


def test_parts_of_a_batch_add_up_to_it(model: nn.Module, images: list[Tensor]) -> None:
    gm = traced(model)
    assert [len(part) for part in incremental.parts_of(images)] == [2, 1, 2]
    with torch.no_grad():
        sums = [incremental.rd_sums(gm(x), x) for x in images]
    meter = ChangeMeter(gm, images)
    total = sums[0] + sums[1]
    assert (meter.base.pixels, meter.base.elements) == (total.pixels, total.elements)
    # Kernels for fewer images round otherwise.
    assert meter.base.bits == pytest.approx(total.bits, rel=1e-6)
    assert meter.base.squared_error == pytest.approx(total.squared_error, rel=1e-6)


def test_what_was_chosen_is_what_was_measured(images: list[Tensor]) -> None:
    # The descent computes values anew only where it needs them; a stale one would show as another RD loss.
    model = small_model("mbt2018")
    gm = fmpq_fx.prepare(
        model, 3 / 32, calibration=images, bits=[3], planner="uniform", lmbda=0.01, activation_bits=None
    )
    layers = quantized_layers(gm)

    def clipped(layer: QuantizedLayer, clip: float) -> QuantizedLayer:
        return quantize_layer(layer.layer, 3, clip=clip)

    with RDDescent(gm, images, 0.01, list(layers)) as descent:
        for site, layer in layers.items():
            descent.best_clip(site, partial(clipped, layer), (0.9, 0.8, 0.7))
            assert descent.rd == pytest.approx(mean_rd(gm, images, 0.01), rel=1e-12)
    assert all(layer.kept_weight is None for layer in quantized_layers(gm).values())


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
