"""On a GPU: the command line computes there, inputs are pinned, and entropy models stay float32."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmpq_fx import convert, load_codec, plan_of, prepare, save
from fmpq_fx.cli.main import main
from fmpq_fx.images.reading import sources, write
from fmpq_fx.training.bfloat16 import transforms_in_bfloat16
from fmpq_fx.training.data import RandomCrops, batches
from support.finetuning import LMBDA, photos, tuned
from support.small_models import small_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_model() -> nn.Module:
    """Return the model that "test_cuda:make_model" names on the command line."""
    return small_model("bmshj2018-hyperprior")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, image in enumerate(photos(4)):
        write(image, tmp_path / f"{index}.png")
    return tmp_path


TRAIN = ("--steps", "4", "--crop", "64", "--validate-every", "2", "--lr", "1e-3", "--bfloat16")


def test_the_zetas_are_those_of_the_cpu_up_to_rounding() -> None:
    calibration = photos(2, side=64)
    cpu = prepare(make_model(), 0.25, calibration=calibration, lmbda=LMBDA)
    gpu = prepare(make_model().cuda(), 0.25, calibration=calibration, lmbda=LMBDA)
    assert {p.device.type for p in gpu.parameters()} == {"cuda"}
    found, expected = plan_of(gpu).sensitivity, plan_of(cpu).sensitivity
    assert found.float_rate == pytest.approx(expected.float_rate, rel=1e-2)
    assert found.float_distortion == pytest.approx(expected.float_distortion, rel=1e-2)
    width = min(found.raw["g_s.0"].keys() & expected.raw["g_s.0"].keys())
    assert found.raw["g_s.0"][width] == pytest.approx(expected.raw["g_s.0"][width], rel=0.1)


def test_a_graph_that_is_moved_takes_all_of_its_model_along() -> None:
    model = make_model()
    model.unused = nn.Linear(2, 2)
    gm = prepare(model, 0.25, calibration=photos(2, side=64), lmbda=LMBDA, planner="uniform")
    devices = {tensor.device.type for tensor in convert(gm.cuda()).state_dict().values()}
    assert devices == {"cuda"}


def test_a_model_on_a_gpu_is_the_class_of_a_file_too(tmp_path: Path) -> None:
    model = make_model()
    gm = prepare(model, 0.25, calibration=photos(2, side=64), lmbda=LMBDA, planner="uniform")
    save(gm, tmp_path / "model.fmpq")
    codec = load_codec(tmp_path / "model.fmpq", model=make_model().cuda())
    assert {tensor.device.type for tensor in codec.state_dict().values()} == {"cpu"}


def test_batches_are_pinned_and_the_same() -> None:
    crops = RandomCrops(sources(photos(5)), 64, seed=3)
    pinned = list(batches(crops, 2, range(3), workers=1, pin_memory=True))
    assert all(x.is_pinned() for x in pinned)
    assert torch.equal(torch.stack(pinned), torch.stack(list(batches(crops, 2, range(3), workers=0))))


def test_training_in_bfloat16_keeps_entropy_models_in_float32_and_lowers_the_loss() -> None:
    gm = prepare(make_model().cuda(), 0.125, calibration=photos(2, side=64), lmbda=LMBDA)
    kinds: dict[str, torch.dtype] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            kinds[name] = (out[1] if isinstance(out, tuple) else out).dtype

        return hook

    names = ("g_a.0", "entropy_bottleneck", "gaussian_conditional")
    hooks = [gm.get_submodule(name).register_forward_hook(look(name)) for name in names]
    x: Tensor = torch.stack(photos(1, side=64)).cuda()
    with transforms_in_bfloat16(gm, x.device):
        gm(x)
    for hook in hooks:
        hook.remove()
    assert [kinds[name] for name in names] == [torch.bfloat16, torch.float32, torch.float32]
    history = tuned(gm, bfloat16=True, steps=20)
    assert history.gain > 0
    assert {p.device.type for p in gm.parameters()} == {"cuda"}


def test_the_command_line_computes_there(folder: Path) -> None:
    state, tuned_state, model, results = (
        folder / name for name in ("state", "tuned", "model.fmpq", "results.json")
    )
    coded, decoded, again = folder / "0.fmi", folder / "decoded.png", folder / "again.png"
    there = ("--device", "cuda")
    torch.cuda.reset_peak_memory_stats()
    for command in (
        ("prepare", "test_cuda:make_model", "--target-cr", 8, "--images", folder, "--out", state, *there),
        ("finetune", state, folder, "--out", tuned_state, *TRAIN, *there),
        ("evaluate", tuned_state, folder, "--json", results, *there),
        ("export", "model", tuned_state, "--out", model),
        ("encode", folder / "0.png", "-m", model, "-o", coded, *there),
        ("decode", coded, "-m", model, "-o", decoded, *there),
        ("decode", coded, "-m", model, "-o", again),
    ):
        assert main(list(map(str, command))) == 0
    assert torch.cuda.max_memory_allocated() > 0
    assert len(json.loads(results.read_text())["images"]) == 4
    assert again.exists(), "what was encoded on the GPU decodes on the CPU"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_have_a_gpu_each(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    state = str(folder / "state")
    for arguments in (
        ["prepare", "test_cuda:make_model", "--target-cr", "8", "--images", str(folder), "--out", state],
        ["finetune", state, str(folder), "--out", str(folder / "tuned"), *TRAIN],
    ):
        command = [*torchrun, "-m", "fmpq_fx", *arguments, "--device", "cuda"]
        job = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
        assert job.returncode == 0, job.stderr
        assert job.stdout.count("state: ") == 1
