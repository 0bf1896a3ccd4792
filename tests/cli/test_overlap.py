"""Folders of images are read, coded and written at the same time, and come out as if one after the other."""

import re
from pathlib import Path
from threading import Event
from weakref import WeakSet

import pytest
from torch import Tensor, fx

import fmpq_fx
from fmpq_fx.cli.main import main
from fmpq_fx.cli.overlap import each
from fmpq_fx.coding import fmi
from fmpq_fx.errors import FmpqError
from fmpq_fx.images import reading
from support.small_models import images

JOBS = {Path(f"{n}.in"): Path(f"{n}.out") for n in range(6)}
NAMES = [source.name for source in JOBS]
PATIENCE = 60  # seconds to wait for what comes at once, unless it never does


class Work:
    """Notes what is done with each source; what ``fails`` names, as "read 0.in", raises an error."""

    def __init__(self, fails: dict[str, BaseException] | None = None) -> None:
        self.fails = fails or {}
        self.done: dict[str, list[str]] = {"read": [], "code": [], "write": []}
        self.begun = {f"{what} {name}": Event() for what in self.done for name in NAMES}

    def run(self) -> list[str]:
        return each(JOBS, "test", self.read, self.code, self.write)

    def read(self, source: Path) -> str:
        return self.note("read", source.name)

    def code(self, name: str) -> str:
        return self.note("code", name)

    def write(self, name: str, out: Path, stop: Event) -> None:
        assert out == JOBS[Path(name)]
        self.note("write", name)

    def note(self, what: str, name: str) -> str:
        self.begun[f"{what} {name}"].set()
        if f"{what} {name}" in self.fails:
            raise self.fails[f"{what} {name}"]
        self.done[what].append(name)
        return name

    def wait(self, what: str) -> None:
        assert self.begun[what].wait(PATIENCE), f"it does not {what} meanwhile"


def test_all_is_done_in_the_order_of_the_sources() -> None:
    work = Work()
    assert work.run() == []
    assert work.done == {"read": NAMES, "code": NAMES, "write": NAMES}


def test_what_fails_is_told_in_order_and_the_others_are_done() -> None:
    work = Work(
        {
            "read 0.in": OSError("is gone"),
            "code 3.in": FmpqError("cannot be coded"),
            "read 5.in": MemoryError("5.in is too large"),
        }
    )
    assert work.run() == ["0.in: is gone", "3.in: cannot be coded", "5.in is too large"]
    assert work.done["write"] == ["1.in", "2.in", "4.in"]


class Overlapped(Work):
    """Codes an image only while the next one is read, and writes one only while the next one is coded."""

    def code(self, name: str) -> str:
        if name != NAMES[-1]:
            self.wait(f"read {NAMES[NAMES.index(name) + 1]}")
        return super().code(name)

    def write(self, name: str, out: Path, stop: Event) -> None:
        if name != NAMES[-1]:
            self.wait(f"code {NAMES[NAMES.index(name) + 1]}")
        super().write(name, out, stop)


def test_while_one_is_coded_the_next_is_read_and_the_last_is_written() -> None:
    work = Overlapped()
    assert work.run() == []
    assert work.done["write"] == NAMES


class Held(Work):
    """Gives the other threads time to run ahead while the first image is coded, and while it is written."""

    def code(self, name: str) -> str:
        if name == "0.in":
            self.wait("read 1.in")
            assert not self.begun["read 2.in"].wait(0.1), "it reads further ahead than one image"
        return super().code(name)

    def write(self, name: str, out: Path, stop: Event) -> None:
        if name == "0.in":
            assert not self.begun["code 2.in"].wait(0.1), "it codes further ahead of the disk than one image"
        super().write(name, out, stop)


def test_no_more_than_three_images_are_under_way() -> None:
    assert Held().run() == []


def test_images_that_are_done_are_let_go() -> None:
    alive: WeakSet[Work] = WeakSet()

    def read(source: Path) -> Work:
        image = Work()
        alive.add(image)
        assert len(alive) <= 3
        return image

    assert each(JOBS, "test", read, lambda image: "coded", lambda image, out, stop: None) == []


def test_a_file_that_cannot_be_written_ends_it_and_what_failed_before_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails = {"read 0.in": FmpqError("is damaged"), "code 3.in": FmpqError("is damaged")}
    work = Work({**fails, "write 2.in": OSError("the disk is full")})
    with pytest.raises(OSError, match="the disk is full"):
        work.run()
    assert work.done["write"] == ["1.in"]
    said = capsys.readouterr().err
    assert "error: 0.in: is damaged" in said
    assert "3.in" not in said, "it would not have come so far"


class Interrupted(Work):
    """Is interrupted while the first file is written."""

    def code(self, name: str) -> str:
        if name == "1.in":
            self.wait("write 0.in")
        return super().code(name)

    def write(self, name: str, out: Path, stop: Event) -> None:
        self.begun["write 0.in"].set()
        assert stop.wait(PATIENCE), "it is not told"


def test_an_interruption_stops_the_file_that_is_written_and_ends_all_else() -> None:
    work = Interrupted({"code 1.in": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        work.run()
    assert work.done["code"] == ["0.in"]
    assert len(work.done["read"]) <= 3


@pytest.fixture
def folder(prepared: fx.GraphModule, tmp_path: Path) -> Path:
    """Return a folder with a model file and a folder of three photographs."""
    fmpq_fx.save(prepared, tmp_path / "model.fmpq")
    (tmp_path / "photos").mkdir()
    for index in range(3):
        reading.write(images()[index % 2], tmp_path / "photos" / f"{index}.png")
    return tmp_path


def test_an_interrupted_command_leaves_whole_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, seen = fmi.encode, []

    def encode(codec: fx.GraphModule, image: Tensor, **options: object) -> bytes:
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(codec, image, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fmi, "encode", encode)
    coded = folder / "coded"
    assert main(["encode", str(folder / "photos"), "-m", str(folder / "model.fmpq"), "-o", str(coded)]) == 130
    assert "interrupted" in capsys.readouterr().err
    written = sorted(path.name for path in coded.iterdir())
    assert written in (["0.fmi"], ["0.fmi", "1.fmi"]), "the second may have been stopped"
    codec = fmpq_fx.load_codec(folder / "model.fmpq")
    for name in written:
        photo = reading.read(folder / "photos" / name.replace("fmi", "png"))
        assert (coded / name).read_bytes() == real(codec, photo)


def test_a_folder_tells_how_many_images_per_second_were_coded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed, model = r"[\d.]+ images per second", ["-m", str(folder / "model.fmpq")]
    coded, back = folder / "coded", folder / "back"
    assert main(["encode", str(folder / "photos"), *model, "-o", str(coded)]) == 0
    rate = r"3 images: [\d,]+ bytes, \d\.\d{4} bits per pixel"
    assert re.fullmatch(f"{rate}, {speed}: {re.escape(str(coded))}\n", capsys.readouterr().out)
    assert main(["decode", str(coded), *model, "-o", str(back)]) == 0
    assert re.fullmatch(f"3 images: {speed}: {re.escape(str(back))}\n", capsys.readouterr().out)
    assert main(["decode", str(coded / "0.fmi"), *model, "-o", str(folder / "0.png")]) == 0
    assert capsys.readouterr().out == f"1 image: {folder / '0.png'}\n"
