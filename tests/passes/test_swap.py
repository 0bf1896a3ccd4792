"""Modules exchanged in a copy that shares everything else."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from fmpq_fx.passes.swap import replace_modules, with_replaced


class Keeps(nn.Module):
    """It keeps its modules in containers as well, and one that leads back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 1, 1), nn.ReLU()
        self.named, self.listed = OrderedDict(conv=self.conv), [self.act, (self.conv,)]
        self.back = [self]


def test_several_modules_are_replaced_under_all_their_names_by_what_has_them_inside() -> None:
    conv, act = nn.Conv2d(1, 1, 1), nn.ReLU()
    model = nn.Sequential(conv, nn.Sequential(act, conv))
    new_conv, new_act = nn.Sequential(conv), nn.Sequential(act, conv)
    replace_modules(model, {conv: new_conv, act: new_act})
    inner: Any = model[1]
    assert [model[0], *inner] == [new_conv, new_act, new_conv]
    assert [*new_conv, *new_act] == [conv, act, conv]


def test_the_new_module_stands_everywhere_and_the_old_model_is_as_it_was() -> None:
    model: Any = nn.Sequential(Keeps(), nn.Conv2d(1, 1, 1))
    old, new = model[0].conv, nn.Conv2d(1, 1, 3)
    twin: Any = with_replaced(model, {old: new})
    kept = twin[0]
    assert [kept.conv, kept.named["conv"], kept.listed[1][0]] == [new, new, new]
    assert type(kept.named) is OrderedDict
    assert kept.act is kept.listed[0] is model[0].act
    assert twin[1] is model[1]
    assert [model[0].conv, model[0].named["conv"], model[0].listed[1][0]] == [old, old, old]


def test_tensors_are_shared_even_when_they_are_exchanged() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(1)))
    twin: Any = with_replaced(model, {model[1][0]: nn.Tanh()})
    model.double()
    model[1][1].weight = nn.Parameter(torch.ones(1))
    assert twin[1][1].weight is model[1][1].weight
    assert twin[0].weight.dtype == torch.float64


def test_without_a_change_it_is_the_same_model() -> None:
    model = nn.Sequential(nn.ReLU())
    assert with_replaced(model, {}) is model
    assert with_replaced(model, {nn.Tanh(): nn.ReLU()}) is model
