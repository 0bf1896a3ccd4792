"""Measurements that are killed and go on: the same bits, and a clear error where the file is of something else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmpq_fx
from fmpq_fx import FmpqError, Sensitivity
from fmpq_fx.passes.measure.changes import ChangeMeter
from fmpq_fx.rd import RDSums
from support.full_disk import small_files
from support.small_models import images, small_model

BITS = (2, 4, 6, 8)
NAME = "bmshj2018-hyperprior"
SITES = 20


class Calls:
    """Counts what is measured, and interrupts at a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interrupt_at: int | None = None):
        self.calls, self.points, self.interrupt_at = 0, 0, interrupt_at
        self.measure: Callable[..., dict[Any, RDSums]] = ChangeMeter.measure
        monkeypatch.setattr(ChangeMeter, "measure", lambda *args: self.count(*args))

    def count(self, meter: ChangeMeter, changes: Mapping[Any, Any], title: str | None) -> dict[Any, RDSums]:
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        self.points += len(changes)
        return self.measure(meter, changes, title)


def killed(path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch, at: int, **options: Any) -> Sensitivity:
    """Start to measure, be interrupted at the site ``at``, and return what the file holds."""
    with monkeypatch.context() as patch:
        Calls(patch, interrupt_at=at)
        with pytest.raises(KeyboardInterrupt):
            fmpq_fx.analyze(small_model(NAME), calibration=x, bits=BITS, checkpoint=path, **options)
    return Sensitivity.load(path)


@pytest.mark.parametrize("at", [2, SITES])
def test_a_killed_measurement_goes_on_to_the_same_bits(
    at: int, tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "table.json", small_model(NAME)
    partial = killed(path, x, monkeypatch, at)
    assert partial.extent == f"{4 * (at - 1)} of 80 values measured"
    calls = Calls(monkeypatch)
    capsys.readouterr()
    resumed = fmpq_fx.analyze(model, calibration=x, bits=BITS, checkpoint=path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 10, "the whole measurement is told of, not each site by itself"
    assert calls.points == 80 - 4 * (at - 1)
    assert resumed == fmpq_fx.analyze(model, calibration=x, bits=BITS)
    assert resumed.complete
    assert path.read_text() == resumed.to_json()
    assert list(tmp_path.iterdir()) == [path]  # no temporary files are left
    done = Calls(monkeypatch)
    assert fmpq_fx.analyze(model, calibration=x, checkpoint=path) == resumed
    assert done.calls == 0


def test_prepare_goes_on_too(tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "table.json", small_model(NAME)
    given: Any = {"target_cr": 0.2, "calibration": x, "bits": BITS, "activation_bits": None}
    straight = fmpq_fx.plan_of(fmpq_fx.prepare(model, **given))
    with monkeypatch.context() as patch:
        Calls(patch, interrupt_at=2)  # the second round
        with pytest.raises(KeyboardInterrupt):
            fmpq_fx.prepare(model, checkpoint=path, **given)
    assert len(Sensitivity.load(path).missing) == 80 - SITES
    assert fmpq_fx.plan_of(fmpq_fx.prepare(model, checkpoint=path, **given)) == straight
    assert Sensitivity.load(path) == straight.sensitivity


def test_an_error_leaves_the_last_whole_table(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    before = killed(path, x, monkeypatch, 3)
    with small_files(path.stat().st_size), pytest.raises(OSError, match=r"cannot write .*table\.json"):
        fmpq_fx.analyze(small_model(NAME), calibration=x, bits=BITS, checkpoint=path)
    assert Sensitivity.load(path) == before


def other_weights() -> nn.Module:
    model = small_model(NAME)
    with torch.no_grad():
        model.get_parameter("g_s.6.bias")[0] += 1e-3
    return model


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what the files of a measurement hold, of one that was killed and of one that came to its end."""
    path, x = tmp_path_factory.mktemp("tables") / "table.json", images()
    with pytest.MonkeyPatch.context() as monkeypatch:
        killed(path, x, monkeypatch, 2, lmbda=0.01)
    partial = path.read_bytes()
    fmpq_fx.analyze(small_model(NAME), calibration=x, checkpoint=path, bits=BITS)
    return {"partial": partial, "complete": path.read_bytes()}


@pytest.mark.parametrize("extent", ["partial", "complete"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": other_weights}, FmpqError, "other weights"),
        ({"model": lambda: small_model("mbt2018-mean")}, FmpqError, "of another model"),
        ({"calibration": torch.zeros(2, 3, 64, 64)}, FmpqError, "other images"),
        ({"lmbda": 0.02}, ValueError, "measured with lmbda 0.01, and 0.02"),
        ({"bits": (2, 4)}, ValueError, r"for \[2, 4, 6, 8\] bits, and \[2, 4\]"),
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(
    change: dict[str, Any],
    error: type[Exception],
    says: str,
    extent: str,
    tables: dict[str, bytes],
    tmp_path: Path,
    x: Tensor,
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(tables[extent])
    options = {"calibration": x, **{name: value for name, value in change.items() if name != "model"}}
    make = change.get("model", lambda: small_model(NAME))
    with pytest.raises(error, match=says):
        fmpq_fx.analyze(make(), checkpoint=path, **options)
    assert path.read_bytes() == tables[extent]


def test_update_does_not_make_another_model(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "table.json", small_model(NAME)
    killed(path, x, monkeypatch, 2)
    model.update()  # type: ignore[operator]
    assert fmpq_fx.analyze(model, calibration=x, bits=BITS, checkpoint=path).complete


def test_files_and_folders_that_cannot_be_checkpoints(tmp_path: Path, x: Tensor) -> None:
    model, path = small_model(NAME), tmp_path / "table.json"
    with pytest.raises(FileNotFoundError, match="no folder"):
        fmpq_fx.analyze(model, calibration=x, checkpoint=tmp_path / "absent" / "table.json")
    path.write_text("{}")
    with pytest.raises(FmpqError, match="not the JSON of a Sensitivity"):
        fmpq_fx.prepare(model, 0.2, calibration=x, checkpoint=path)
    table = fmpq_fx.analyze(model, calibration=x, bits=[8])
    with pytest.raises(ValueError, match="pass one of them"):
        fmpq_fx.prepare(model, 0.2, calibration=x, sensitivity=table, checkpoint=path)
