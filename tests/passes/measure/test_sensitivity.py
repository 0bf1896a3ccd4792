"""analyze() against a naive computation that shares no code with it, and what it does with bad input."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from compressai.layers import GDN, MaskedConv2d
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError, Sensitivity
from fmpq_fx.passes.measure.kept_values import Budget
from fmpq_fx.passes.measure.rerun import UNCHANGED, IncrementalInterpreter, find_downstream
from fmpq_fx.passes.plan.tables import monotone
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.swap import substituted
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import quantize_layer
from support.small_models import small_model

LMBDA = 0.01


def naive_rd(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Rate and weighed distortion by CompressAI's formulas, summed in double precision."""
    with torch.no_grad():
        out = model(x)
    bits = sum(-torch.log2(p).double().sum().item() for p in out["likelihoods"].values())
    mse = ((out["x_hat"] - x) ** 2).double().mean().item()
    return bits / (x.size(0) * x.size(2) * x.size(3)), LMBDA * 255**2 * mse


def on_grid(weight: Tensor, bits: int, dim: int, signed: bool) -> Tensor:
    """Quantize channel by channel, in a Python loop."""
    last = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    result = weight.clone()
    for channel in range(weight.size(dim)):
        w = weight.select(dim, channel)
        peak = w.abs().max()
        if peak > 0:
            step = (peak / last).log().exp()  # steps are kept as logarithms
            result.select(dim, channel).copy_(torch.round(w / step) * step)
    return result


def quantize_in_place(model: nn.Module, name: str, bits: int) -> None:
    layer = model.get_submodule(name)
    with torch.no_grad():
        if isinstance(layer, GDN):
            gamma = on_grid(layer.gamma_reparam(layer.gamma), bits, 0, signed=False)
            layer.gamma_reparam.forward = lambda _: gamma  # the gamma that multiplies
        else:
            weight = layer.get_parameter("weight")
            if isinstance(layer, MaskedConv2d):
                weight.mul_(layer.mask)
            transposed = isinstance(layer, nn.ConvTranspose2d)
            weight.copy_(on_grid(weight, bits, 1 if transposed else 0, signed=True))


def test_zeta_is_that_of_a_naive_computation(model: nn.Module, x: Tensor) -> None:
    # If an evaluation re-ran too little, kept a stale value, or stopped too early, a value would differ. In double
    # precision, what differs is not how a processor adds up.
    model, x = model.double(), x.double()
    table = fmpq_fx.analyze(model, calibration=x, lmbda=LMBDA, bits=(2, 4, 7))
    rate, distortion = naive_rd(model, x)
    assert (table.float_rate, table.float_distortion) == pytest.approx((rate, distortion), rel=1e-9)
    for site in table.sites:
        for bits in table.bits:
            twin = copy.deepcopy(model)
            quantize_in_place(twin, site.name, bits)
            r, d = naive_rd(twin, x)
            zeta = (r + d - rate - distortion) / (rate + distortion)
            # 1e-12 is what double precision leaves of a difference of two numbers near 1.
            assert table.raw[site.name][bits] == pytest.approx(zeta, rel=1e-6, abs=1e-12), (site.name, bits)
            assert table.rate[site.name][bits] == pytest.approx(
                (r - rate) / (rate + distortion), rel=1e-6, abs=1e-12
            )


def test_several_batches_of_different_sizes_count_by_their_pixels(x: Tensor) -> None:
    model, x = small_model("bmshj2018-hyperprior").double(), x.double()
    large = torch.rand(1, 3, 128, 64, generator=torch.Generator().manual_seed(2)).double()
    table = fmpq_fx.analyze(model, calibration=[x, large], bits=[3], lmbda=LMBDA)
    parts = [naive_rd(model, batch) for batch in (x, large)]
    pixels = [2 * 64 * 64, 128 * 64]
    rate = sum(n * r for n, (r, _) in zip(pixels, parts, strict=True)) / sum(pixels)
    assert table.float_rate == pytest.approx(rate, rel=1e-9)


def test_an_evaluation_runs_only_what_is_downstream(x: Tensor) -> None:
    gm = trace(small_model("bmshj2018-hyperprior"))
    find_sites(gm)
    runs: list[str] = []

    class Counting(IncrementalInterpreter):
        def run_node(self, n):  # type: ignore[no-untyped-def]
            runs.append(n.name)
            return super().run_node(n)

    interpreter = Counting(gm, find_downstream(gm), Budget(2**30))
    with torch.no_grad():
        before = interpreter.run_once(x)
        runs.clear()
        with substituted(gm, {"h_s.2": quantize_layer(gm.get_submodule("h_s.2"), 3)}):
            after = interpreter.rerun(("h_s.2",))
    # The hyper decoder does not touch the image: y_hat is the same, so the synthesis transform does not run.
    assert not any(name.startswith(("g_a", "h_a", "h_s_0", "g_s")) for name in runs)
    assert after["x_hat"] is UNCHANGED
    assert after["likelihoods"]["z"] is UNCHANGED
    assert not torch.equal(after["likelihoods"]["y"], before["likelihoods"]["y"])


def test_a_substituted_layer_is_put_back_also_after_an_error() -> None:
    model = small_model("mbt2018-mean")
    layer = model.get_submodule("g_a.2")
    quantized = quantize_layer(layer, 4)

    def fail_within() -> None:
        with substituted(model, {"g_a.2": quantized}):
            assert model.get_submodule("g_a.2") is quantized
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_within()
    assert model.get_submodule("g_a.2") is layer


def test_the_model_is_not_modified(model: nn.Module, x: Tensor) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fmpq_fx.analyze(model, calibration=x, bits=[4])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_balanced_lambda_makes_rate_and_distortion_weigh_the_same(x: Tensor) -> None:
    table = fmpq_fx.analyze(small_model("mbt2018-mean"), calibration=x, bits=[8])
    assert table.float_rate == pytest.approx(table.float_distortion, rel=1e-12)


def test_monotone_is_the_nearest_falling_sequence() -> None:
    # Pool adjacent violators by hand: 0.1 and 0.3 average to 0.2; -0.02 and 0.01 to -0.005.
    table = monotone({"a": {2: 1.0, 3: 0.1, 4: 0.3, 5: -0.02, 6: 0.01}})
    assert table["a"] == pytest.approx({2: 1.0, 3: 0.2, 4: 0.2, 5: -0.005, 6: -0.005})


def test_json_round_trip(tmp_path, x: Tensor) -> None:  # type: ignore[no-untyped-def]
    table = fmpq_fx.analyze(small_model("mbt2018"), calibration=x, bits=[3, 5])
    table.save(tmp_path / "table.json")
    again = Sensitivity.load(tmp_path / "table.json")
    assert again == table
    assert again.zeta == table.zeta


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "not the JSON of a Sensitivity"),
        (lambda text: text.replace('"Sensitivity"', '"Plan"'), "another format"),
        (lambda text: text.replace('"g_a.0"', '"other"', 1), "not of its sites"),
        (lambda _: "[]", "not the JSON"),
    ],
)
def test_damaged_json_is_refused(tmp_path, x: Tensor, damage: Callable[[str], str], says: str) -> None:  # type: ignore[no-untyped-def]
    table = fmpq_fx.analyze(small_model("bmshj2018-hyperprior"), calibration=x, bits=[3])
    (tmp_path / "table.json").write_text(damage(table.to_json()))
    with pytest.raises(FmpqError, match=says):
        Sensitivity.load(tmp_path / "table.json")


def test_a_missing_table_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FmpqError, match=r"no file .*absent\.json"):
        Sensitivity.load(tmp_path / "absent.json")


@pytest.mark.parametrize("bits", [[], [1], [17], [2.5], [True]])
def test_bits_out_of_range(x: Tensor, bits: list[int]) -> None:
    with pytest.raises(ValueError, match="bits must"):
        fmpq_fx.analyze(small_model("bmshj2018-hyperprior"), calibration=x, bits=bits)


@pytest.mark.parametrize("lmbda", [0.0, -1.0, math.nan, math.inf])
def test_lambda_out_of_range(x: Tensor, lmbda: float) -> None:
    with pytest.raises(ValueError, match="lmbda must be a positive number"):
        fmpq_fx.analyze(small_model("bmshj2018-hyperprior"), calibration=x, bits=[8], lmbda=lmbda)


def test_weights_that_are_not_finite_are_named(x: Tensor) -> None:
    model = small_model("bmshj2018-hyperprior")
    with torch.no_grad():
        model.get_parameter("g_s.2.weight")[0, 0, 0, 0] = math.nan
    with pytest.raises(FmpqError, match=r"1 of \d+ values of g_s\.2\.weight are NaN"):
        fmpq_fx.analyze(model, calibration=x, bits=[8])


def test_an_rd_loss_that_is_not_finite_is_an_error(x: Tensor) -> None:
    model = small_model("bmshj2018-hyperprior")
    with torch.no_grad():
        model.get_parameter("entropy_bottleneck.quantiles").fill_(math.nan)  # of no site: the loss tells
    with pytest.raises(FmpqError, match="not finite"):
        fmpq_fx.analyze(model, calibration=x, bits=[8])


@pytest.mark.parametrize("size", [8, 40])
def test_images_that_do_not_suit_the_stride(size: int) -> None:
    with pytest.raises(FmpqError, match="multiple"):
        fmpq_fx.analyze(small_model("mbt2018-mean"), calibration=torch.rand(1, 3, size, size), bits=[8])
