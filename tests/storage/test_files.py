"""Files are written whole or not at all."""

import stat
from pathlib import Path
from threading import Event

import pytest

from fmpq_fx.storage.files import replacing, write_text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")

    def write_half() -> None:
        with replacing(file) as half:
            half.write(b"ha")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert file.read_text() == "old"


def test_writing_in_a_thread_can_be_stopped_and_leaves_nothing(tmp_path: Path) -> None:
    stop = Event()

    def write_half() -> None:
        with replacing(tmp_path / "image.png", stop) as half:
            half.write(b"ha")
            stop.set()
            half.write(b"lf")

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())


def test_a_written_file_replaces_the_old_one_and_others_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    expected = stat.S_IMODE(file.stat().st_mode)
    write_text(file, "new … ζ")
    assert file.read_text(encoding="utf-8") == "new … ζ"
    assert stat.S_IMODE(file.stat().st_mode) == expected
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"it is a folder; name a file in it"):
        write_text(tmp_path, "")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; create it"):
        write_text(tmp_path / "absent" / "plan.json", "")
