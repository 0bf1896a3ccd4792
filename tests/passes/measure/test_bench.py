"""Running graphs fast: which layers are exchanged meanwhile."""

from contextlib import suppress

import torch
from torch import nn

from fmpq_fx.passes.measure.bench import run_fast
from fmpq_fx.passes.trace import trace
from fmpq_fx.quant import FastConvTranspose2d
from support.small_models import images, small_model


def test_the_last_layer_is_fast_within_the_block_alone() -> None:
    gm, x = trace(small_model("bmshj2018-hyperprior").eval()), images()
    before = {name: module for name, module in gm.named_modules() if isinstance(module, nn.ConvTranspose2d)}
    with torch.no_grad():
        expected = gm(x)["x_hat"]
    with suppress(KeyError), run_fast(gm):
        assert isinstance(gm.get_submodule("g_s.6"), FastConvTranspose2d)
        found = gm(x)["x_hat"]
        assert not found.requires_grad
        raise KeyError
    torch.testing.assert_close(found, expected)
    assert all(gm.get_submodule(name) is module for name, module in before.items())


def test_layers_with_hooks_are_called_themselves() -> None:
    gm = trace(small_model("bmshj2018-hyperprior").eval())
    last = gm.get_submodule("g_s.6")
    last.register_forward_hook(lambda module, inputs, out: out + 1)
    with run_fast(gm):
        assert gm.get_submodule("g_s.6") is last
