"""Copies of models share nothing with them, and are what deepcopy makes."""

import copy

import torch
from torch import nn

from fmpq_fx.passes.tracing.duplicates import duplicate


class Keeper(nn.Module):
    """Keeps containers: empty, filled, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register: dict[str, int] = {}
        self.both = self.register
        self.tied = self.layer
        self.filled = [self.layer, []]


def test_a_copy_is_what_deepcopy_makes() -> None:
    model = Keeper()
    for twin in (duplicate(model), copy.deepcopy(model)):
        assert vars(twin).keys() == vars(model).keys()
        assert twin.register == {}
        assert twin.both is twin.register is not model.register
        assert twin.tied is twin.layer is twin.filled[0] is not model.layer
        assert twin.filled[1] is not model.filled[1]
        assert torch.equal(twin.layer.weight, model.layer.weight)
        assert twin.layer.weight is not model.layer.weight


def test_hooks_of_a_copy_are_its_own() -> None:
    model = Keeper()
    called: list[str] = []
    twin = duplicate(model)
    twin.layer.register_forward_hook(lambda *_: called.append("twin"))
    model.layer(torch.zeros(1, 2))
    assert called == []
    again = duplicate(twin)
    again.layer(torch.zeros(1, 2))
    assert called == ["twin"]
