"""Ranges of channels: they give a layer's output a small error, of its input and its weights together."""

import numpy as np
import torch
from torch import Tensor, nn

from fmpq_fx.passes.clip.histograms import OCTAVE, Histogram
from fmpq_fx.passes.clip.steps import LARGEST, fit_sizes
from fmpq_fx.quant import QuantizedLayer, quantize_layer

FACTORS = torch.tensor([1.0, 0.03, 8.0, 0.5])


def inputs(*, tail: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 32, 32, generator=generator) * FACTORS.view(-1, 1, 1)
    x[0, :, 0, 0] *= tail  # of a thousand values, one
    return x


def convolution(groups: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(4, 4, 1, bias=False, groups=groups)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    return layer


def sizes(layer: QuantizedLayer, x: Tensor, levels: int = 255) -> np.ndarray:
    peaks = x.abs().amax((0, 2, 3)).double().numpy()
    histogram = Histogram(peaks, -3)
    histogram.count(x)
    widest = int(np.ceil(OCTAVE * np.log2(peaks.max())))
    fitted: np.ndarray = fit_sizes(layer, histogram, widest, (1.0, 1.0), levels)
    return fitted


def error(layer: QuantizedLayer, x: Tensor, fitted: np.ndarray) -> float:
    """Return the squared error of the output where the inputs have ranges of these sizes."""
    assert layer.input_quantizer is not None
    end = 2.0 ** (fitted.max() / OCTAVE)
    spread = (fitted - fitted.max()) * np.log(2) / OCTAVE
    layer.set_spread(spread.tolist() if spread.any() else ())
    layer.input_quantizer.freeze(-end, end, False)
    with torch.no_grad():
        return float((layer(x) - layer.layer(x)).square().mean())


def test_ranges_are_better_than_one_for_all_and_than_each_channels_own() -> None:
    x, layer = inputs(), quantize_layer(convolution(), 8, 8)
    fitted = sizes(layer, x)
    own = np.ceil(OCTAVE * np.log2(x.abs().amax((0, 2, 3)).numpy())).astype(int)
    assert fitted.max() - fitted.min() > OCTAVE, "channels differ by 256 times"
    assert error(layer, x, fitted) < 0.7 * error(layer, x, np.full(4, own.max()))
    assert error(layer, x, fitted) < 0.9 * error(layer, x, own), (
        "here weights of narrow channels would be lost"
    )


def test_coarse_steps_clip_what_is_rare() -> None:
    layer = quantize_layer(convolution(), 8, 4)
    calm, wild = (sizes(layer, inputs(tail=tail), levels=15) for tail in (1.0, 4.0))
    assert wild.max() - calm.max() < OCTAVE, "two octaves more would cover all"
    everything = int(np.ceil(OCTAVE * np.log2(inputs(tail=4.0).abs().max().item())))
    assert wild.max() < everything


def test_groups_have_one_step_for_all() -> None:
    fitted = sizes(quantize_layer(convolution(groups=2), 8, 8), inputs())
    assert len(set(fitted.tolist())) == 1


def test_channels_that_say_nothing_stay_within_what_files_hold() -> None:
    x = inputs()
    x[:, 1] = 1e-9
    fitted = sizes(quantize_layer(convolution(), 8, 8), x)
    assert fitted.max() - fitted.min() <= LARGEST
