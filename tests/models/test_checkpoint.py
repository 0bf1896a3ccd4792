"""Checkpoints as people have them: they load, or one sentence says what they are and what to do."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, fx, nn

import fmpq_fx
from fmpq_fx.cli.main import main
from fmpq_fx.formats.state import save_state
from fmpq_fx.history import Settings
from fmpq_fx.models.zoo import load_model, model_names
from fmpq_fx.training.run import TrainingRun
from support.small_models import SMALL, small_model

State = Mapping[str, Tensor]


def own_model() -> nn.Module:
    """Return a model for "test_checkpoint:own_model", whose tables are of weights that are not loaded."""
    model = SMALL["mbt2018-mean"]()
    model.update()  # type: ignore[operator]
    return model


def prefixed(prefix: str, state: State) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def old(form: str) -> Callable[[State], object]:
    """Return what renames the parameters of entropy bottlenecks as earlier versions of CompressAI spelled them."""
    names = {"matrices": "matrix", "biases": "bias", "factors": "factor"}

    def rename(match: re.Match[str]) -> str:
        return form.format(singular=names[match[1]], plural=match[1])

    return lambda state: {re.sub(r"(matrices|biases|factors)\.", rename, n): v for n, v in state.items()}


def under(place: str) -> Callable[[State], object]:
    return lambda state: {place: state, "optimizer": {"state": {}}}


def without(*endings: str) -> Callable[[State], object]:
    return lambda state: {name: v for name, v in state.items() if not name.endswith(endings)}


TABLES = ("_quantized_cdf", "_offset", "_cdf_length")
FORMS: dict[str, Callable[[State], object]] = {
    "plain": dict,
    "DataParallel": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "both": lambda state: {"state_dict": prefixed("module._orig_mod.", state)},
    "compiled parts": lambda state: {name.replace("g_a.", "g_a._orig_mod."): v for name, v in state.items()},
    "Lightning": lambda state: {
        "epoch": 3,
        "state_dict": prefixed("model.", state) | {"loss.weight": torch.ones(3)},
        "hyper_parameters": {"lmbda": 0.01},
    },
    "a prefix of its own": lambda state: {"net": prefixed("codec.inner.", state), "step": 7},
    **{place: under(place) for place in ("model", "network", "ema_state_dict", "params", "model_state_dict")},
    "weights and their average": lambda state: {
        "ema_state_dict": {name: v + 1 for name, v in state.items()},
        "state_dict": state,
    },
    "no tables": without(*TABLES, "scale_table"),
    "no offsets": without("_offset"),
    "parameters alone": without(*TABLES, "scale_table", "bound", "target", "pedestal", "mask"),
    "first names": old("_{plural}."),
    "second names": old("_{singular}"),
    "half precision": lambda state: {n: v.half() if v.is_floating_point() else v for n, v in state.items()},
}


@pytest.mark.parametrize("spec", ["mbt2018-mean", "test_checkpoint:own_model"])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_loads_after_the_obvious_change(form: str, spec: str, tmp_path: Path, x: Tensor) -> None:
    model: Any = small_model("mbt2018-mean")
    with torch.no_grad():
        model.entropy_bottleneck.quantiles.mul_(3)  # tables of another size than those of a new model
    if form != "half precision":
        model.update(force=True)
    content = FORMS[form](model.state_dict())
    torch.save(content, tmp_path / "weights")
    loaded: Any = load_model(spec, checkpoint=tmp_path / "weights")
    assert not loaded.training
    for name, value in model.named_parameters():
        assert torch.allclose(
            loaded.get_parameter(name), value, rtol=1e-3, atol=1e-3 * (form == "half precision")
        )
    loaded.update()
    if form != "half precision":
        assert loaded.compress(x)["strings"] == model.compress(x)["strings"]


def test_safetensors_load(tmp_path: Path) -> None:
    model = small_model("mbt2018")
    safetensors.torch.save_file(prefixed("model.", model.state_dict()), tmp_path / "weights.safetensors")
    loaded = load_model("mbt2018", checkpoint=tmp_path / "weights.safetensors")
    assert torch.equal(loaded.get_parameter("g_a.0.weight"), model.get_parameter("g_a.0.weight"))


@pytest.mark.parametrize("name", model_names())
def test_a_checkpoint_of_another_model_shows_a_few_names_of_each_side(name: str, tmp_path: Path) -> None:
    torch.save({f"encoder.{i}.weight": torch.zeros(1) for i in range(2000)}, tmp_path / "weights")
    with pytest.raises(fmpq_fx.FmpqError, match=rf"the checkpoint is not of a {name}: it lacks ") as caught:
        load_model(name, checkpoint=tmp_path / "weights")
    said = str(caught.value)
    assert "it has encoder.0.weight, encoder.1.weight, encoder.2.weight and 1997 more" in said
    assert len(said) < 400


def test_what_a_checkpoint_lacks_or_has_of_another_shape_is_named(tmp_path: Path) -> None:
    state = small_model("mbt2018-mean").state_dict()
    for change, says in (
        ({"g_s.6.bias": None}, r"it lacks g_s\.6\.bias$"),
        ({"extra.weight": torch.zeros(1)}, r"it has extra\.weight, which the model has not"),
        ({"g_s.6.bias": torch.zeros(4)}, r"g_s\.6\.bias is 4 there and 3 in the model"),
    ):
        torch.save({n: v for n, v in (state | change).items() if v is not None}, tmp_path / "weights")
        for spec in ("mbt2018-mean", "test_checkpoint:own_model"):
            with pytest.raises(fmpq_fx.FmpqError, match=says):
                load_model(spec, checkpoint=tmp_path / "weights")


class Foreign:
    """What a training script may pickle beside the weights."""


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "namespace": (
        lambda path: torch.save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(n=1)}, path),
        "objects of argparse.Namespace beside tensors",
    ),
    "class": (lambda path: torch.save(Foreign(), path), "objects of test_checkpoint.Foreign beside tensors"),
    "a whole model": (
        lambda path: torch.save(nn.Linear(1, 1), path),
        "objects of torch.nn.modules.linear.Linear",
    ),
    "old format": (
        lambda path: torch.save({"args": Foreign()}, path, _use_new_zipfile_serialization=False),
        "objects of test_checkpoint.Foreign",
    ),
    "pointer": (
        lambda path: path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
        ),
        "a pointer of Git LFS to the file.*'git lfs pull'",
    ),
    "page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>"),
        "a web page",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "zeros": (lambda path: path.write_bytes(bytes(10000)), "is empty"),
    "archive": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "compressed archive.*unpack"),
    "text": (lambda path: path.write_text("nothing of the kind"), "no format that is known here"),
    "cut": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is damaged"),
    "cut pickle": (lambda path: path.write_bytes(b"\x80\x02}q\x00"), "is damaged"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "nothing": (lambda path: None, "there is no checkpoint"),
    "numbers": (lambda path: torch.save([1, 2, 3], path), "holds no state dict"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "holds no state dict"),
}


def said_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command line says of ``path`` as a checkpoint, which is one sentence."""
    for spec in ("mbt2018", "test_checkpoint:own_model"):
        assert main(["prepare", spec, "--target-cr", "4", "--checkpoint", str(path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fmpq-fx: error: ")
        assert said.count("\n") == 1
        assert "\x1b" not in said
        assert "weights_only" not in said
    return said


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, says = FOREIGN[kind]
    write(tmp_path / "file")
    assert re.search(says, said_of(tmp_path / "file", capsys))


def test_our_own_files_are_named(
    gm: fx.GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fmpq_fx.save(gm, tmp_path / "model.fmpq")
    save_state(gm, tmp_path / "state", model="bmshj2018-hyperprior")
    TrainingRun(gm, [], Settings(0.01)).save(tmp_path / "training", {})
    fmpq_fx.export_checkpoint(gm, tmp_path / "checkpoint")
    for name, says in (
        ("model.fmpq", "is a model file"),
        ("state", "is a state file of"),
        ("training", "that was interrupted; the same command goes on"),
    ):
        assert says in said_of(tmp_path / name, capsys)
    for name, says in (
        ("model.fmpq", "is a model file (.fmpq), not a file that 'fmpq-fx prepare"),
        ("checkpoint", "'fmpq-fx prepare MODEL --checkpoint' reads it"),
    ):
        assert main(["export", "model", str(tmp_path / name), "--out", str(tmp_path / "new.fmpq")]) == 2
        assert says in capsys.readouterr().err
    for name in ("state", "checkpoint", "training"):
        assert main(["inspect", str(tmp_path / name)]) == 2
        assert "no model file that fmpq_fx.save() wrote; '" in capsys.readouterr().err
