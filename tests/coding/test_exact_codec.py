"""exact= of convert() and load_codec(), what cannot be exact, files, and strings that were damaged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressai.models import JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError
from fmpq_fx.exact import ExactLayer
from fmpq_fx.storage import fingerprint
from support.coded_models import codec, graph_of, latents, lively, quantized
from support.hyperpriors import Hyperprior


def softplus() -> nn.Module:
    return Hyperprior(lambda m, x: F.softplus(x))


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_weight_beyond_fixed_point() -> None:
    model = MeanScaleHyperprior(8, 12)
    nn.init.constant_(model.h_s[4].weight, 1e9)
    with pytest.raises(FmpqError, match=r"'h_s\.4' has no exact form: it multiplies by"):
        fmpq_fx.convert(graph_of(model.eval(), images()), exact="require")


def test_coding_loops_of_the_users_own_are_not_replaced() -> None:
    class Own(JointAutoregressiveHierarchicalPriors):
        def _compress_ar(self, *args: Any) -> Any:
            return super()._compress_ar(*args)

    with pytest.raises(FmpqError, match="'context_prediction' is a masked convolution"):
        fmpq_fx.convert(graph_of(Own(12, 12).eval(), images()), exact="require")


def test_exact_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="exact is 'always'; pass True, False"):
        fmpq_fx.convert(quantized("scale hyperprior"), exact="always")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018"])
def test_a_file_gives_the_same_codec(name: str, tmp_path: Path) -> None:
    x = lively(name)[1][:, :, :64, :64]
    paths = tmp_path / "a.fmpq", tmp_path / "b.fmpq"
    fmpq_fx.save(quantized(name), paths[0])
    gm = fmpq_fx.load(paths[0])
    fmpq_fx.save(gm, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    codecs: list[Any] = [codec(name), fmpq_fx.convert(gm), *map(fmpq_fx.load_codec, paths)]
    assert len(set(map(fingerprint.of_codec, codecs))) == 1
    with torch.no_grad():
        coded = codecs[0].compress(x)
    assert all(torch.equal(latents(other, coded), latents(codecs[0], coded)) for other in codecs)
    floating = fmpq_fx.load_codec(paths[0], exact=False)
    assert not any(isinstance(module, ExactLayer) for module in floating.modules())
    with torch.no_grad():
        assert torch.equal(gm(x)["x_hat"], quantized(name)(x)["x_hat"])


def test_a_file_knows_which_parameters_are_added_on_the_path(tmp_path: Path) -> None:
    gm = graph_of(Hyperprior(lambda m, x: x + m.offset).eval(), images(), None)
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    made: Any = fmpq_fx.load_codec(
        tmp_path / "model.fmpq", model=lambda: Hyperprior(lambda m, x: x + m.offset)
    )
    converted: Any = fmpq_fx.convert(gm, exact="require")
    assert made.offset * 4096 == round(0.3 * 4096)
    with torch.no_grad():
        coded = converted.compress(images())
    assert torch.equal(latents(made, coded), latents(copy.deepcopy(converted).double(), coded))


def test_a_file_of_what_has_no_exact_form_says_so(tmp_path: Path) -> None:
    gm = graph_of(softplus().eval(), images())
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    with pytest.warns(UserWarning, match="'softplus'"):
        fmpq_fx.load_codec(tmp_path / "model.fmpq", model=softplus)
    with pytest.raises(FmpqError, match="'softplus'"):
        fmpq_fx.load_codec(tmp_path / "model.fmpq", model=softplus, exact="require")


@pytest.mark.parametrize("name", ["scale hyperprior", "mbt2018", "cheng2020-checkerboard"])
def test_damaged_strings_give_a_damaged_image_or_an_error(name: str) -> None:
    _, x = lively(name)
    with torch.no_grad():
        coded = codec(name).compress(x[:1, :, :64, :64])
    for strings in (
        [[string[: len(string) // 2] + bytes(4096)] for (string,) in coded["strings"]],
        [[bytes(b ^ 0x55 for b in string) + bytes(4096)] for (string,) in coded["strings"]],
    ):
        values = latents(codec(name), {**coded, "strings": strings})
        assert values.shape[2:] == (4, 4)
        assert values.isfinite().all()


def test_the_table_says_what_is_summed_in_what() -> None:
    table = fmpq_fx.exact_table(codec("mbt2018")).splitlines()
    (row,) = [line for line in table if "context_prediction" in line]
    assert "-16777215 … 16777215" in row
    assert "float64" in row
    (row,) = [line for line in table if "entropy_parameters.2" in line]
    assert "float32" in row
    assert fmpq_fx.exact_table(lively("mbt2018")[0]).startswith("No layer")
