"""The training of the benchmarks on a GPU; its parts are tried on a CPU too, where steps are not recorded."""

import sys
from pathlib import Path

import pytest
import torch
from compressai.layers import MaskedConv2d
from compressai.models import Cheng2020Anchor
from torch import Tensor

from fmpq_fx.history import Settings
from fmpq_fx.images.reading import sources
from support.finetuning import photos

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_training

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def masked(model: Cheng2020Anchor) -> tuple[Tensor, Tensor]:
    """Return the weights of the context model that count, and those that the mask hides."""
    context = model.context_prediction
    weight, mask = context.weight.detach().cpu(), context.mask.cpu()
    return weight[mask == 1], weight[mask == 0]


@pytest.mark.parametrize("device", DEVICES)
def test_all_weights_are_trained_and_hidden_ones_stay_zero(device: str) -> None:
    torch.manual_seed(0)
    model = Cheng2020Anchor(8).to(device)
    before, _ = masked(model)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = Settings(0.01, steps=10, batch_size=2, crop=64, lr=1e-3, validate_every=4)
    history = gpu_training.train(model, sources(photos(3, side=160)), settings, sources(photos(2, side=64)))
    assert history.validation[-1].rd_loss < history.validation[0].rd_loss
    assert [v.step for v in history.validation] == [0, 4, 8, 10]
    assert len(history.losses) == 10
    assert len(set(history.losses)) == 10, "other crops and other noise in every step"
    same = [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert not same
    assert isinstance(model.context_prediction, MaskedConv2d)
    after, hidden = masked(model)
    assert not torch.equal(before, after)
    assert not hidden.any()


@pytest.mark.parametrize("device", DEVICES)
def test_crops_are_parts_of_photographs_whole_and_halved(device: str) -> None:
    ramp = torch.arange(200) / 255
    photograph = torch.stack([ramp[:, None].expand(200, 170), ramp[None, :170].expand(200, 170)])
    photograph = torch.cat([photograph, torch.zeros(1, 200, 170)])
    crops = gpu_training.CropsOnDevice(sources([photograph]), 64, 4, torch.device(device))
    for _ in range(5):
        x = crops.draw().cpu()
        assert x.shape == (4, 3, 64, 64)
        rows, columns = x[:, 0].diff(dim=1) * 255, x[:, 1].diff(dim=2) * 255
        steps = torch.tensor([1.0, 1, 2, 2])[:, None, None]  # a halved crop spans twice as much
        assert torch.allclose(rows, steps.expand_as(rows), atol=1e-3)
        assert torch.allclose(columns.abs(), steps.expand_as(columns), atol=1e-3), "some are mirrored"
        assert not x[:, 2].any()
