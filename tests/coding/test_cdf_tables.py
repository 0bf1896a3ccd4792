"""CDF tables are those of the weights, whatever the class says about ``update()``."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyModel, GaussianConditional
from compressai.models import MeanScaleHyperprior
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.coding.cdf_tables import update_tables
from support.trained_graphs import trained


class Without(MeanScaleHyperprior):
    """It has no ``update()``."""

    update = None


class Verbose(MeanScaleHyperprior):
    """Its ``update()`` does not know ``force``, and leaves tables that are there alone."""

    def update(self, scale_table: Any = None, verbose: bool = False) -> bool:
        assert not verbose
        return bool(super().update(scale_table))


class Needy(MeanScaleHyperprior):
    """Its ``update()`` cannot be called without an argument."""

    def update(self, scale_table: Any) -> bool:
        return bool(super().update(scale_table))


OTHERS: list[Callable[..., nn.Module]] = [Without, Verbose, Needy]


def tables(codec: nn.Module) -> dict[str, Tensor]:
    kinds = ("_quantized_cdf", "_cdf_length", "_offset", "scale_table")
    return {name: value for name, value in codec.state_dict().items() if name.endswith(kinds)}


@functools.cache
def converted(make: Callable[..., nn.Module], with_tables: bool) -> Any:
    torch.manual_seed(0)
    model = make(8, 12).eval()
    if with_tables:
        update_tables(model)
    gm = trained(model)
    with torch.no_grad():
        gm.get_parameter("entropy_bottleneck.quantiles")[:, :, 2].mul_(2)  # so that tables are longer
    return fmpq_fx.convert(gm)


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("with_tables", [False, True])
def test_tables_are_those_of_the_weights_whatever_update_is(
    make: Callable[..., nn.Module], with_tables: bool, x: Tensor
) -> None:
    codec, stock = converted(make, with_tables), converted(MeanScaleHyperprior, with_tables)
    assert tables(codec).keys() == tables(stock).keys()
    assert all(torch.equal(tables(codec)[name], value) for name, value in tables(stock).items())
    with torch.no_grad():
        coded = codec.compress(x)
        assert codec.decompress(coded["strings"], coded["shape"])["x_hat"].shape == x.shape


@pytest.mark.parametrize("make", OTHERS)
def test_a_float_model_without_tables_is_evaluated(make: Callable[..., nn.Module], x: Tensor) -> None:
    torch.manual_seed(0)
    model = make(8, 12)
    assert fmpq_fx.evaluate(model, {"first": x[0]}).bpp > 0
    assert tables(model)["entropy_bottleneck._quantized_cdf"].numel() == 0, "it is not modified"


def test_a_scale_table_of_the_users_own_is_kept() -> None:
    model = Without(8, 12)
    model.gaussian_conditional = GaussianConditional([0.5, 1.0, 2.0])
    update_tables(model)
    assert model.gaussian_conditional.scale_table.tolist() == [0.5, 1.0, 2.0]
    assert len(model.gaussian_conditional.quantized_cdf) == 3


def test_tables_that_are_there_are_kept_where_only_missing_ones_are_asked_for() -> None:
    model = Without(8, 12)
    update_tables(model)
    marked = model.entropy_bottleneck.quantized_cdf
    model.gaussian_conditional = GaussianConditional(None)
    update_tables(model, missing=True)
    assert model.entropy_bottleneck.quantized_cdf is marked
    assert len(model.gaussian_conditional.quantized_cdf) == 64


def test_an_entropy_model_of_an_unknown_kind_is_named() -> None:
    class Unknown(EntropyModel):
        def update(self, image: Tensor) -> None:
            raise AssertionError

    model = Without(8, 12)
    model.gaussian_conditional = Unknown()
    with pytest.raises(FmpqError, match=r"'gaussian_conditional' cannot be built: a Unknown has no update"):
        update_tables(model)
