"""The commands for model files and coded images, as a user types them."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fmpq_fx
from fmpq_fx.cli.main import main
from fmpq_fx.formats.state import save_state
from fmpq_fx.images import reading
from support.coded_models import graph_of
from support.small_models import small_model


class Private(nn.Module):
    """A model of a class that is not in the zoo."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model("mbt2018-mean")

    def forward(self, x: torch.Tensor) -> object:
        return self.inner(x)

    def update(self, force: bool = False) -> object:
        return self.inner.update(force=force)  # type: ignore[operator]

    def compress(self, x: torch.Tensor) -> object:
        return self.inner.compress(x)  # type: ignore[operator]

    def decompress(self, strings: object, shape: object) -> object:
        return self.inner.decompress(strings, shape)  # type: ignore[operator]


def fails() -> nn.Module:
    raise KeyError("width")


def run(*arguments: object) -> int:
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a state, its model file, other models, two photographs of different sizes, and one coded."""
    folder = tmp_path_factory.mktemp("files")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, bits in (("model", 8), ("other", 6)):
        gm = graph_of(small_model("mbt2018-mean"), x, bits=bits)
        fmpq_fx.save(gm, folder / f"{name}.fmpq")
        save_state(gm, folder / f"{name}.state", model="mbt2018-mean")
    fmpq_fx.save(graph_of(Private().eval(), x, bits=8), folder / "private.fmpq")
    (folder / "photos").mkdir()
    for index, size in enumerate([(64, 64), (50, 90)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    (folder / "coded").mkdir()
    source, coded = folder / "photos" / "0.png", folder / "coded" / "a.fmi"
    assert run("encode", source, "-m", folder / "model.fmpq", "-o", coded) == 0
    return folder


def test_export_model_writes_what_save_writes(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "model", files / "model.state", "--out", tmp_path / "m.fmpq") == 0
    assert (tmp_path / "m.fmpq").read_bytes() == (files / "model.fmpq").read_bytes()
    assert run("inspect", tmp_path / "m.fmpq") == 0
    printed = capsys.readouterr().out
    assert "g_a.0" in printed
    assert f"{(tmp_path / 'm.fmpq').stat().st_size:,}" in printed


def test_an_image_there_and_back(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, coded, back = files / "photos" / "1.png", tmp_path / "1.fmi", tmp_path / "1.png"
    assert run("encode", source, "-m", files / "model.fmpq", "-o", coded) == 0
    printed = capsys.readouterr().out
    assert f"{8 * coded.stat().st_size / (50 * 90):.4f} bits per pixel" in printed
    assert run("decode", coded, "-m", files / "model.fmpq", "-o", back) == 0
    codec = fmpq_fx.load_codec(files / "model.fmpq")
    expected = fmpq_fx.decode(codec, fmpq_fx.encode(codec, reading.read(source)))
    assert torch.equal(reading.read(back), (expected * 255).round() / 255)


def test_folders_of_images(files: Path, tmp_path: Path) -> None:
    assert run("encode", files / "photos", "-m", files / "model.fmpq", "-o", tmp_path / "coded") == 0
    assert sorted(p.name for p in (tmp_path / "coded").iterdir()) == ["0.fmi", "1.fmi"]
    assert run("decode", tmp_path / "coded", "-m", files / "model.fmpq", "-o", tmp_path / "back") == 0
    assert reading.read(tmp_path / "back" / "1.png").shape == (3, 50, 90)


def test_a_pipe_and_what_a_link_leads_to_are_named_as_they_are(files: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "opened").touch()
    (tmp_path / "link").symlink_to(tmp_path / "opened")
    to = ("encode", files / "photos" / "0.png", "-m", files / "model.fmpq", "-o")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_bytes)
        assert run(*to, tmp_path / "pipe") == 0
        coded = read.result()
    assert run(*to, tmp_path / "link") == 0
    assert run(*to, tmp_path / "a.fmi") == 0
    assert coded == (tmp_path / "opened").read_bytes() == (tmp_path / "a.fmi").read_bytes()


def test_a_memory_that_is_too_little_is_an_error(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, model = files / "photos" / "1.png", files / "model.fmpq"
    assert run("encode", photo, "-m", model, "-o", tmp_path / "a.fmi", "--memory", "1kB") == 2
    assert "needs about" in capsys.readouterr().err
    assert not (tmp_path / "a.fmi").exists()
    assert run("encode", photo, "-m", model, "-o", tmp_path / "a.fmi", "--memory", "1GB") == 0
    assert run("decode", tmp_path / "a.fmi", "-m", model, "-o", tmp_path / "a.png", "--memory", "1kB") == 2
    assert "needs about" in capsys.readouterr().err
    assert run("evaluate", model, files / "photos", "--memory", "2XB") == 2
    assert "memory is '2XB'" in capsys.readouterr().err


def test_evaluate_takes_a_model_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", files / "model.fmpq", files / "photos") == 0
    by_file = capsys.readouterr().out
    assert run("evaluate", files / "model.state", files / "photos") == 0
    drop_times = [
        [line.split()[:5] for line in text.splitlines()] for text in (by_file, capsys.readouterr().out)
    ]
    assert drop_times[0] == drop_times[1]


def test_a_private_class_is_named_on_the_command_line(files: Path, tmp_path: Path) -> None:
    arguments = ("-m", files / "private.fmpq", "--class", "test_cli_files:Private")
    assert run("encode", files / "photos" / "0.png", *arguments, "-o", tmp_path / "0.fmi") == 0
    assert run("decode", tmp_path / "0.fmi", *arguments, "-o", tmp_path / "0.png") == 0


MISTAKES = {
    "the wrong model": (
        "decode {tmp}/a.fmi -m {files}/other.fmpq -o {tmp}/a.png",
        "another model",
    ),
    "no such source": (
        "encode {tmp}/none -m {files}/model.fmpq -o {tmp}/b.fmi",
        "no file and no",
    ),
    "no images": (
        "encode {tmp} -m {files}/model.fmpq -o {tmp}/b",
        "no images in",
    ),
    "nothing coded": (
        "decode {files} -m {files}/model.fmpq -o {tmp}/b",
        "no .fmi files in",
    ),
    "no such folder": (
        "encode {files}/photos/0.png -m m -o {tmp}/no/b.fmi",
        "no folder",
    ),
    "unknown format": (
        "decode {tmp}/a.fmi -m m -o {tmp}/a.xyz",
        "expected one of .bmp",
    ),
    "no such model": (
        "decode {tmp}/a.fmi -m {tmp}/m.fmpq -o {tmp}/a.png",
        "there is no model file",
    ),
    "not an image": (
        "decode {files}/photos/0.png -m {files}/model.fmpq -o {tmp}/a.png",
        "no .fmi",
    ),
    "private class": (
        "decode {tmp}/a.fmi -m {files}/private.fmpq -o {tmp}/a.png",
        "--class",
    ),
    "malformed class": (
        "decode {tmp}/a.fmi -m {files}/private.fmpq --class Private -o {tmp}/a.png",
        "expected package.module:callable",
    ),
    "failing class": (
        "decode {tmp}/a.fmi -m {files}/private.fmpq --class test_cli_files:fails -o {tmp}/b.png",
        "cannot get a model from 'test_cli_files:fails': KeyError: 'width'",
    ),
    "suffix": (
        "export model {files}/model.state --out {tmp}/m.bin",
        "named *.fmpq",
    ),
    "coded as a picture": (
        "encode {files}/photos/0.png -m {files}/model.fmpq -o {tmp}/b.png",
        "a coded image is named *.fmi; got {tmp}/b.png",
    ),
    "coded without a suffix": (
        "encode {files}/photos/0.png -m {files}/model.fmpq -o {tmp}/b",
        "a coded image is named *.fmi; got {tmp}/b",
    ),
    "graphs in torch": (
        "encode {files}/photos/0.png -m {files}/model.fmpq -o {tmp}/b.fmi --graphs {tmp}/onnx",
        "--graphs would change nothing: --backend torch runs no exported graphs",
    ),
    "an option of another backend": (
        "encode {files}/photos/0.png -m {files}/model.fmpq -o {tmp}/b.fmi --backend openvino --providers X",
        "--providers would change nothing: that is for --backend onnxruntime",
    ),
    "a precision in torch": (
        "encode {files}/photos/0.png -m {files}/model.fmpq -o {tmp}/b.fmi --precision bf16",
        "--precision would change nothing: that is for --backend openvino",
    ),
    "inspect a state": (
        "inspect {files}/model.state",
        "no model file",
    ),
}
"""What is typed, and what is said of it."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(
    mistake: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(files / "coded" / "a.fmi", tmp_path)
    line, says = MISTAKES[mistake]
    assert main([word.format(files=files, tmp=tmp_path) for word in line.split()]) == 2
    assert says.format(tmp=tmp_path) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.fmi"]


def test_two_images_of_one_name_are_not_written_over_each_other(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("png", "bmp"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"same.{suffix}")
    assert run("encode", tmp_path, "-m", files / "model.fmpq", "-o", tmp_path / "out") == 2
    assert "same.bmp and same.png would both be written" in capsys.readouterr().err


def damaged(folder: Path, suffix: str) -> Path:
    """Return ``folder`` with one more file that cannot be read."""
    (folder / f"0-bad{suffix}").write_bytes(b"nothing of the kind")
    return folder


def test_one_bad_file_of_a_folder_is_listed_and_the_others_are_coded(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "photos", tmp_path / "photos")
    model, photos, coded = files / "model.fmpq", damaged(tmp_path / "photos", ".png"), tmp_path / "coded"
    assert run("encode", photos, "-m", model, "-o", coded) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("2 images: ")
    assert "1 of 3 images could not be encoded:\n" in printed.err
    assert f"{photos}/0-bad.png" in printed.err
    assert sorted(path.name for path in coded.iterdir()) == ["0.fmi", "1.fmi"]

    assert run("decode", damaged(coded, ".fmi"), "-m", model, "-o", tmp_path / "back") == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("2 images: ")
    assert f"1 of 3 images could not be decoded:\n  {coded}/0-bad.fmi: it is no .fmi file" in printed.err
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["0.png", "1.png"]

    results = tmp_path / "results.json"
    with pytest.warns(UserWarning, match="skipped"):
        assert run("evaluate", model, photos, "--json", results) == 2
    printed = capsys.readouterr()
    assert "mean" in printed.out
    assert "1 of 3 images could not be evaluated:\n" in printed.err
    assert "0-bad.png" in json.loads(results.read_text())["skipped"][0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_work_and_what_failed_before_is_listed(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "photos", tmp_path / "photos")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.fmi").symlink_to("/dev/full")
    photos = damaged(tmp_path / "photos", ".png")
    assert run("encode", photos, "-m", files / "model.fmpq", "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "0-bad.png" in said
    assert said.endswith(f"error: cannot write {tmp_path / 'out' / '0.fmi'}: No space left on device\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.fmi"]


def test_what_a_format_cannot_keep_is_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, coded = files / "model.fmpq", files / "coded" / "a.fmi"
    images = {}
    for suffix in reading.WRITTEN:
        out = tmp_path / f"a{suffix}"
        assert run("decode", coded, "-m", model, "-o", out) == 0
        assert (".png keeps what was decoded" in capsys.readouterr().err) == (suffix in (".jpg", ".jpeg"))
        images[suffix] = reading.read(out)
    for suffix, image in images.items():
        assert torch.equal(image, images[".png"]) == (suffix not in (".jpg", ".jpeg")), suffix
