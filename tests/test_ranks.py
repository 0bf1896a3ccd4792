"""Several processes on one job, as torchrun starts them: results of one, printed once, and errors instead of hangs."""

import copy
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fmpq_fx import FmpqError, History, plan_of, ranks
from fmpq_fx.cli.main import main
from fmpq_fx.images.reading import sources, write
from fmpq_fx.ranks import Ranks
from fmpq_fx.training.data import RandomCrops, batches
from fmpq_fx.training.run import TrainingRun
from support import rank_jobs
from support.finetuning import photos, stopping_at
from support.rank_jobs import both_sizes, uniform, without_noise

# A process that has imported everything once, and that each rank is a fork of.
multiprocessing.set_forkserver_preload(["support.rank_jobs"])


@dataclass(frozen=True)
class Ended:
    """A job that ended with an error."""

    said: str  # by the launcher
    stdout: str  # of all ranks, one after the other
    stderr: str


def launched(job: Callable[[Path], None], folder: Path, logs: Path) -> Ended:
    """Run ``job``, which is to fail in the end, in two processes of one thread, as torchrun does."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=job.__name__,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(ChildFailedError) as error:
            elastic_launch(config, job)(folder)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    stdout, stderr = (
        "".join(path.read_text() for path in sorted(logs.glob(f"**/{name}.log")))
        for name in ("stdout", "stderr")
    )
    return Ended(str(error.value), stdout, stderr)


@pytest.fixture(scope="module")
def gm4() -> fx.GraphModule:
    return uniform()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, gm4: fx.GraphModule) -> list[dict[str, Any]]:
    """Return what each of two ranks made; they went on from a checkpoint of one process, after half of the steps."""
    folder = tmp_path_factory.mktemp("ranks")
    gm = copy.deepcopy(gm4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingRun, "step", stopping_at(4, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            without_noise(gm, checkpoint=folder / "training.pt", loss="mse")
    job = launched(rank_jobs.share_work, folder, tmp_path_factory.mktemp("logs"))
    # The other rank may fail for want of it before anybody sees that it was killed.
    ends = "SIGKILL" in job.said or "the other ranks cannot be reached" in job.said + job.stderr
    assert ends, f"a killed rank ends the job, and it is to come so far: {job.stderr}"
    made = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    history = without_noise(copy.deepcopy(gm4), checkpoint=folder / "training.pt", loss="mse")
    assert history.to_json() == made[0]["resumed"]["history"], "rank 0 wrote the checkpoint to the end"
    return made


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return math.sqrt(sum((a[name].double() - b[name].double()).square().sum().item() for name in a))


def test_ranks_prepare_what_one_process_does_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for name, gm in both_sizes().items():
        for rank in found:
            assert rank[name]["plan"] == plan_of(gm).to_json()
            assert all(torch.equal(value, rank[name]["state"][key]) for key, value in gm.state_dict().items())


@pytest.mark.parametrize("name", ["tuned", "resumed", "bfloat16", "size"])
def test_all_ranks_end_with_the_same_model_and_history(found: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in found)
    assert first["history"] == second["history"]
    assert distance(first["state"], second["state"]) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tuned", {}),
        ("resumed", {"loss": "mse"}),
        ("bfloat16", {"bfloat16": True}),
        ("size", {"size_weight": 1.0}),
    ],
)
def test_ranks_train_to_nearly_what_one_process_does(
    found: list[dict[str, Any]], gm4: fx.GraphModule, name: str, options: dict[str, Any]
) -> None:
    """But for rounding the gradient is that of the whole batch; bfloat16 rounds more."""
    gm = copy.deepcopy(gm4)
    history = without_noise(gm, **options)
    there = History.from_json(found[0][name]["history"])
    assert there.losses == pytest.approx(history.losses, rel=1e-2 if options.get("bfloat16") else 1e-4)
    moved = distance(gm.state_dict(), gm4.state_dict())
    assert (
        distance(gm.state_dict(), found[0][name]["state"])
        < (0.3 if options.get("bfloat16") else 0.03) * moved
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with photographs to prepare and train on."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "photos").mkdir()
    for index, image in enumerate(photos(3)):
        write(image, folder / "photos" / f"{index}.png")
    return folder


def test_rank_0_prints_and_writes_what_one_process_does_and_a_failing_rank_ends_the_job(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = launched(rank_jobs.command_line, folder, tmp_path)
    assert "imed out" not in job.stderr, "it waited for a rank that was gone"
    assert "fmpq-fx: error: rank 1 of 2: its disk is full" in job.stderr
    assert "rank 0 of 2: this command runs in one process" in job.stderr
    alone = folder / "alone"
    given = ("--target-cr", 8, "--images", folder / "photos", "--bits", "3-5", "--out", alone)
    assert main(["prepare", "support.rank_jobs:model", *map(str, given)]) == 0
    printed = capsys.readouterr().out.replace(str(alone), str(folder / "state"))
    assert job.stdout.startswith(printed)
    assert alone.read_bytes() == (folder / "state").read_bytes()
    assert [line for line in job.stdout.splitlines() if "state:" in line] == [
        f"state: {folder / name}" for name in ("state", "tuned")
    ]
    assert {path.name for path in folder.iterdir()} <= {"photos", "alone", "state", "tuned", "x.training"}


def test_a_rank_that_is_gone_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_gather_object", closed)
    with pytest.raises(FmpqError, match=r"the other ranks cannot be reached .*\(Connection closed by peer\)"):
        Ranks(0, 2).gather(1)


def test_alone_nothing_is_shared() -> None:
    with ranks.joined() as device:
        assert device == torch.device("cpu")
        assert not dist.is_initialized()
        alone = ranks.current()
        assert (alone.rank, alone.count, ranks.is_first()) == (0, 1, True)
        assert alone.merge(alone.share([3, 1, 2])) == [3, 1, 2]


def test_the_crops_of_a_step_are_dealt_to_the_ranks() -> None:
    crops = RandomCrops(sources(photos(5)), 64, seed=3)
    (whole,) = batches(crops, 4, range(2, 3), workers=0)
    for rank in range(2):
        (own,) = batches(crops, 4, range(2, 3), Ranks(rank, 2), workers=0)
        assert torch.equal(own, whole[rank::2])


def test_devices_that_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["prepare", "sample", "--target-cr", "4", "--device", "cuda"]) == 2
    assert "the device cuda is not there" in capsys.readouterr().err
    assert main(["prepare", "sample", "--target-cr", "4", "--device", "gpu"]) == 2
    assert "there is no device 'gpu'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        FmpqError, match=r"cuda:1 is not there: this machine has 1 GPU; start at most one process"
    ):
        ranks.own_device("cuda")


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (["pass", "pass"], "left: True"),
        (["raise ValueError"], "left: False"),
        (["pass", "raise ValueError"], "left: False"),
        (["raise ValueError", "pass"], "left: True"),
    ],
)
def test_a_process_that_succeeded_leaves_its_group_before_python_ends(blocks: list[str], said: str) -> None:
    script = """
import atexit, contextlib, torch.distributed as dist
from fmpq_fx import ranks
atexit.register(lambda: print("left:", not dist.is_initialized()))
"""
    for block in blocks:
        script += f"""
with contextlib.suppress(ValueError), ranks.joined():
    assert dist.is_initialized()
    {block}
"""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "TORCHELASTIC_RUN_ID": "test"}
    job = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (job.returncode, said in job.stdout) == (0, True), job.stderr
