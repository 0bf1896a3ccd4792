"""The size of the weights in the loss: its estimate, its gradients, and the smaller file that it leads to."""

import copy
from pathlib import Path

import pytest
import torch
from compressai.layers import GDN, MaskedConv2d
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import History, samples
from fmpq_fx.history import Settings, Validation, best_of
from fmpq_fx.passes.measure.coded_sizes import coded_size
from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_class, quantized_layers
from fmpq_fx.training.loop import train
from fmpq_fx.training.run import TrainingRun
from fmpq_fx.training.weight_entropy import weight_bits, weight_cr
from support.finetuning import LMBDA, photos, same_state, stopping_at, tuned
from support.small_models import small_model


def layers_of(model: nn.Module, bits: int) -> list[QuantizedLayer]:
    sites = [module for module in model.modules() if quantized_class(module)]
    return [quantize_layer(copy.deepcopy(module), bits) for module in sites]


def coded_cr(gm: nn.Module) -> float:
    layers = quantized_layers(gm).values()
    return sum(map(coded_size, layers)) / sum(4 * layer.float_weight().numel() for layer in layers)


@pytest.mark.parametrize("bits", [3, 4, 6, 8, 12])
def test_the_estimate_is_near_the_coded_bytes_of_a_trained_model(bits: int) -> None:
    layers = layers_of(samples.model(), bits)
    real = sum(map(coded_size, layers)) / sum(4 * layer.float_weight().numel() for layer in layers)
    assert weight_cr(layers).item() == pytest.approx(real, rel=0.04)


def naive_bits(layer: QuantizedLayer, widths: Tensor) -> float:
    """Return what :func:`weight_bits` is to be, weight by weight, for logistic distributions of ``widths``."""
    total = 0.0
    for integer, width in zip(layer.integers.flatten().tolist(), widths.flatten().tolist(), strict=True):
        logistic = torch.distributions.TransformedDistribution(
            torch.distributions.Uniform(torch.zeros((), dtype=torch.float64), 1.0),
            [torch.distributions.SigmoidTransform().inv, torch.distributions.AffineTransform(0.0, width)],
        )
        ends = torch.tensor([integer - 0.5, integer + 0.5], dtype=torch.float64)
        below, above = logistic.cdf(ends).tolist()
        total -= torch.tensor(above - below + 2**-17, dtype=torch.float64).log2().item()
    return total


def test_an_integer_takes_the_logarithm_of_its_share_of_a_logistic_distribution() -> None:
    conv = nn.Conv2d(1, 1, 5)
    layer = quantize_layer(conv, 4)
    # Without factors of channels, and with one of a place each, the width is that of the magnitude itself.
    size = layer.integers.abs().double()
    mean = size + 0.05 * size.mean() + 1e-6
    widths = 0.5 / torch.asinh(torch.log(torch.tensor(2.0)) / mean)
    assert weight_bits(layer).item() == pytest.approx(naive_bits(layer, widths), rel=1e-4)


def test_gradients_lead_to_a_smaller_size_and_those_of_steps_are_scaled_as_in_the_rd_loss() -> None:
    torch.manual_seed(0)
    layer = quantize_layer(nn.ConvTranspose2d(16, 16, 5, groups=2), 5)
    quantizer, weight = layer.weight_quantizer, layer.layer.get_parameter("weight")
    before = weight_bits(layer)
    before.backward()
    assert weight.grad is not None
    assert quantizer.log_scale.grad is not None
    expected = -(weight.grad * weight).sum() * quantizer.grad_scale
    assert quantizer.log_scale.grad.sum().item() == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():
        larger = copy.deepcopy(layer)
        larger.weight_quantizer.log_scale.sub_(0.3 * quantizer.log_scale.grad.sign())
        nearer = copy.deepcopy(layer)
        nearer.layer.get_parameter("weight").sub_(0.01 * weight.grad.sign())
        for changed in (larger, nearer):
            assert weight_bits(changed) < before
            assert coded_size(changed) < coded_size(layer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 4),
        nn.Conv2d(4, 6, 3, groups=2),
        MaskedConv2d(4, 6, 5),
        GDN(6),
        nn.Conv2d(2, 3, 1).bfloat16(),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("bits", [2, 12])
def test_every_kind_of_layer_has_finite_gradients(layer: nn.Module, bits: int) -> None:
    quantized = quantize_layer(copy.deepcopy(layer), bits)
    found = weight_bits(quantized)
    found.backward()
    assert 0 <= found.item() < 2 * bits * quantized.float_weight().numel()
    parameter = quantized.layer.get_parameter(quantized.weight_name)
    assert parameter.grad is not None
    assert parameter.grad.isfinite().all()
    if isinstance(layer, MaskedConv2d):
        assert not parameter.grad[layer.mask == 0].any()


def test_the_steps_of_the_input_that_are_folded_in_count() -> None:
    layer = quantize_layer(nn.Conv2d(3, 4, 3), 6, 8)
    layer.set_spread([0.0, 0.5, 1.0])
    weight_bits(layer).backward()
    spread = layer.weight_quantizer.log_spread
    assert spread is not None
    assert spread.grad is not None
    assert (spread.grad > 0).all(), "a larger spread has finer steps, and larger integers"


def test_training_with_it_makes_the_file_smaller(gm: fx.GraphModule, tmp_path: Path) -> None:
    plain = copy.deepcopy(gm)
    without = tuned(plain, quantizer_lr=5e-2)
    history = tuned(gm, quantizer_lr=5e-2, size_weight=1000.0)
    assert coded_cr(gm) < 0.97 * coded_cr(plain)
    assert history.best.cr == coded_cr(gm) < (history.validation[0].cr or 0)
    assert {v.cr for v in without.validation} == {None}
    sizes = []
    for model in (gm, plain):
        fmpq_fx.save(model, tmp_path / "model.fmpq")
        sizes.append(fmpq_fx.file_report(tmp_path / "model.fmpq").coded)
    assert sizes[0] < sizes[1]


def test_a_weight_of_0_is_training_without_it(gm: fx.GraphModule) -> None:
    other = copy.deepcopy(gm)
    assert tuned(gm, steps=4, size_weight=0.0) == tuned(other, steps=4)
    assert same_state(gm, other)


def test_an_interrupted_run_ends_like_any_other(
    gm: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, checkpoint = copy.deepcopy(gm), tmp_path / "training.pt"
    expected = tuned(whole, steps=8, size_weight=1.0, checkpoint=tmp_path / "whole.pt")
    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "step", stopping_at(6, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuned(copy.deepcopy(gm), steps=8, size_weight=1.0, checkpoint=checkpoint)
    assert tuned(gm, steps=8, size_weight=1.0, checkpoint=checkpoint) == expected
    assert same_state(gm, whole)


def test_the_best_state_is_that_of_the_lowest_sum() -> None:
    validation = [
        Validation(0, 0.5, 0.1, 1.0, 0.2),
        Validation(1, 0.5, 0.2, 1.05, 0.1),
        Validation(2, 0.5, 0.3, 2.0, 0.0),
    ]
    assert [best_of(validation, Settings(LMBDA, size_weight=w)).step for w in (0.1, 1.0, 20.0)] == [0, 1, 2]
    assert best_of(validation, Settings(LMBDA, loss="mse")).step == 0


def test_the_history_shows_it_and_comes_back(gm: fx.GraphModule) -> None:
    history = tuned(gm, size_weight=1000.0, steps=4, quantizer_lr=1e-2)
    assert History.from_json(history.to_json()) == history
    first, best = history.validation[0].cr, history.best.cr
    assert "coded CR" in str(history)
    assert f"{best:.4f}  kept" in str(history)
    assert f"coded CR {first:.4f} -> {best:.4f}" in " ".join(fmpq_fx.bit_table(gm).split())


def test_a_model_without_quantized_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"size_weight 1 weighs the coded weights, and the model has no quantized"
    ):
        train(small_model("mbt2018-mean"), photos(6), Settings(LMBDA, crop=64, size_weight=1.0), workers=0)
