"""State files: what they bring back is the same graph, bit for bit, ready to train on."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, Plan, plan_of
from fmpq_fx.formats.state import FORMAT, load_state, save_state, spec_of
from fmpq_fx.history import History, Settings, Validation
from fmpq_fx.passes.annotation import annotate_graph, graph_note
from support.small_models import SMALL, small_model
from support.trained_graphs import trained


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("name", SMALL)
def test_a_zoo_model_comes_back_bit_for_bit(
    name: str, activation_bits: int | None, x: Tensor, tmp_path: Path
) -> None:
    gm = trained(small_model(name), activation_bits)
    save_state(gm, tmp_path / "state", model=name)
    loaded = load_state(tmp_path / "state")
    with torch.no_grad():
        mine, other = gm.eval()(x), loaded(x)
    assert torch.equal(mine["x_hat"], other["x_hat"])
    assert all(torch.equal(p, other["likelihoods"][key]) for key, p in mine["likelihoods"].items())
    assert plan_of(loaded) == plan_of(gm)
    assert spec_of(tmp_path / "state") == name
    before = dict(gm.named_parameters())
    assert {key for key, p in loaded.named_parameters()} == set(before)
    assert all(torch.equal(p, before[key]) for key, p in loaded.named_parameters())


def make_model() -> nn.Module:
    return small_model("mbt2018-mean")


def test_a_model_of_the_users_own_comes_back(x: Tensor, tmp_path: Path) -> None:
    gm = trained(small_model("mbt2018-mean"))
    save_state(gm, tmp_path / "state", model="test_state:make_model")
    with torch.no_grad():
        assert torch.equal(load_state(tmp_path / "state")(x)["x_hat"], gm.eval()(x)["x_hat"])


def test_the_codec_of_a_loaded_state_writes_the_same_bitstreams(x: Tensor, tmp_path: Path) -> None:
    gm = trained(small_model("bmshj2018-hyperprior"))
    save_state(gm, tmp_path / "state", model="bmshj2018-hyperprior")
    codecs: list[Any] = [fmpq_fx.convert(gm), fmpq_fx.convert(load_state(tmp_path / "state"))]
    mine, other = (codec.compress(x)["strings"] for codec in codecs)
    assert mine == other


def test_the_history_of_fine_tuning_is_kept(tmp_path: Path) -> None:
    gm = trained(small_model("bmshj2018-hyperprior"))
    history = History(Settings(0.01), "a", "b", (1.0,), (Validation(0, 0.5, 0.01, 1.5),))
    annotate_graph(gm, history=history)
    save_state(gm, tmp_path / "state", model="bmshj2018-hyperprior")
    assert graph_note(load_state(tmp_path / "state")).history == history


def test_the_file_is_as_its_documentation_says(tmp_path: Path) -> None:
    gm = trained(small_model("bmshj2018-hyperprior"))
    save_state(gm, tmp_path / "state", model="bmshj2018-hyperprior")
    with safe_open(tmp_path / "state", framework="pt") as stored:
        metadata, names = stored.metadata(), set(stored.keys())
    about = json.loads(metadata["state"])
    assert about.keys() == {"format", "model", "plan"}
    assert about["format"] == FORMAT
    assert Plan.from_json(about["plan"]) == plan_of(gm)
    assert {"model.g_a.0.weight", "quantizers.g_a.0.weight_quantizer.log_scale"} <= names
    assert all(name.startswith(("model.", "quantizers.")) for name in names)


def test_what_is_no_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(FmpqError, match=r"there is no file .*absent; 'fmpq-fx prepare"):
        load_state(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FmpqError, match=r"text is not a file that 'fmpq-fx prepare"):
        load_state(tmp_path / "text")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(FmpqError, match="no format of ours"):
        load_state(tmp_path / "other")


@pytest.mark.parametrize("lost", ["model.g_a.0.weight", "quantizers.g_a.0.weight_quantizer.log_scale"])
def test_a_damaged_file_is_refused(tmp_path: Path, lost: str) -> None:
    save_state(trained(small_model("bmshj2018-hyperprior")), tmp_path / "state", model="bmshj2018-hyperprior")
    with safe_open(tmp_path / "state", framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(tmp_path / "state")
    del tensors[lost]
    save_file(tensors, tmp_path / "state", metadata=metadata)
    with pytest.raises(FmpqError, match=r"damaged|not of a bmshj2018-hyperprior"):
        load_state(tmp_path / "state")


def test_a_graph_that_was_not_prepared_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FmpqError, match="carries no plan"):
        save_state(fx.symbolic_trace(nn.Identity()), tmp_path / "state", model="x")
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_the_graph_alone(tmp_path: Path) -> None:
    gm = trained(small_model("bmshj2018-hyperprior"))
    before = copy.deepcopy(gm.state_dict())
    save_state(gm, tmp_path / "state", model="bmshj2018-hyperprior")
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
