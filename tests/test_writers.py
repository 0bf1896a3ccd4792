"""Whatever the package writes is a file like any other: it keeps links and devices, and has ordinary permissions."""

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

import fmpq_fx
from fmpq_fx.formats.state import save_state
from fmpq_fx.history import Settings
from fmpq_fx.images import reading
from fmpq_fx.training.run import TrainingRun
from support.coded_models import graph_of
from support.full_disk import small_files
from support.traced_models import Codec

WRITERS: dict[str, Callable[[fx.GraphModule, Path], object]] = {
    "model.fmpq": fmpq_fx.save,
    "model.pth.tar": fmpq_fx.export_checkpoint,
    "weights": fmpq_fx.export_checkpoint,  # without a suffix
    "state": lambda gm, path: save_state(gm, path, model="bmshj2018-hyperprior"),
    "plan.json": lambda gm, path: fmpq_fx.plan_of(gm).save(path),
    "plan.png": fmpq_fx.plot_plan,  # and other formats, by the same function of matplotlib
    "image.png": lambda gm, path: reading.write(torch.rand(3, 32, 32), path),
    "image.tif": lambda gm, path: reading.write(torch.rand(3, 32, 32), path),
    "training": lambda gm, path: TrainingRun(gm, [], Settings(0.01)).save(path, {}),
}
every_writer = pytest.mark.parametrize("name", WRITERS)


@every_writer
def test_a_written_file_has_the_permissions_of_any_new_file(
    name: str, gm: fx.GraphModule, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        WRITERS[name](gm, tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == [name]


@every_writer
def test_a_link_stays_one_and_what_it_points_to_is_written(
    name: str, gm: fx.GraphModule, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / name, tmp_path / "elsewhere" / "file"
    link.symlink_to(target)
    for _ in range(2):  # a link to nothing, and to a file
        WRITERS[name](gm, link)
        assert link.is_symlink()
        assert target.stat().st_size > 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([name, "elsewhere", "file"])


@every_writer
def test_a_pipe_stays_one_and_gets_the_bytes(name: str, gm: fx.GraphModule, tmp_path: Path) -> None:
    pipe = tmp_path / name
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    WRITERS[name](gm, pipe)
    reader.join()
    assert len(got[0]) > 0
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@every_writer
def test_a_full_disk_is_said_in_one_sentence_and_leaves_what_was_there(
    name: str, gm: fx.GraphModule, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("old")
    with (
        small_files(40),
        pytest.raises(OSError, match=rf"^cannot write \S*{name}: File too large$") as caught,
    ):
        WRITERS[name](gm, tmp_path / name)
    assert caught.value.errno == errno.EFBIG
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@every_writer
def test_a_device_that_is_full_stays_what_it_is(name: str, gm: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        WRITERS[name](gm, tmp_path / name)
    assert (tmp_path / name).is_char_device()


def test_a_folder_of_graphs_is_written_where_a_link_points_and_replaces_no_other_files(
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnx")
    # The least model that there is: exports take seconds.
    gm = graph_of(Codec(), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), bits=8)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "graphs").symlink_to(tmp_path / "elsewhere")
    fmpq_fx.export_onnx(gm, tmp_path / "graphs")
    assert (tmp_path / "graphs").is_symlink()
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()
    (tmp_path / "graphs" / "notes.txt").write_text("of the user")
    with pytest.raises(fmpq_fx.FmpqError, match="is no export; name another folder"):
        fmpq_fx.export_onnx(gm, tmp_path / "graphs")
    assert (tmp_path / "graphs" / "notes.txt").read_text() == "of the user"
    (tmp_path / "graphs" / "notes.txt").unlink()
    with small_files(40), pytest.raises(OSError, match=r"^cannot write \S*graphs: .*File too large$"):
        fmpq_fx.export_onnx(gm, tmp_path / "graphs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "graphs"]
