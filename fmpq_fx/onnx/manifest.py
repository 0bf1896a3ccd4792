"""The manifest of an export, ``manifest.json`` in its folder, and the check that the folder has just its files."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.files import JsonFile, followed, writing

NAME = "manifest.json"
VERSION = 4
"""It also changes when an export becomes faster, so that graphs that are kept beside model files are made anew."""


@dataclass(frozen=True)
class PartFile:
    """One ONNX graph."""

    name: str  # its role, as :func:`fmpq_fx.passes.parts.cut` names it
    file: str  # name of the file in the folder
    sha256: str
    bytes: int
    inputs: dict[str, list[int | str]]  # by name; numbers are fixed sizes, texts name dynamic ones
    outputs: dict[str, list[int | str]]
    # The module of the model that computes the output from ``entry``, if there is one.
    module: str | None = None
    entry: str | None = None  # the value that this module reads: an input, or a value inside the graph
    # Runtime that does not compute what torch does -> the reason.
    unusable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRun:
    """The record of one site in an export: how it runs, and how its weights are stored."""

    site: str
    part: str | None  # None if torch runs it, inside of an opaque module
    bits: int | None  # None is float32
    runs: str  # "int8" or "float32"
    stored: str  # an integer type, "int8" say, or "float32"
    bytes: float  # bytes of the stored weights
    why: str  # the reason that it runs in this type


@dataclass(frozen=True)
class OnnxManifest(JsonFile):
    """The contents of the folder of an export."""

    version: int
    model: dict[str, Any]  # the model's :func:`fmpq_fx.models.identity.identity_of`
    # Fingerprints of its codecs, without and with exact entropy path (:mod:`fmpq_fx.storage.fingerprint`).
    fingerprints: tuple[str, ...]
    form: str  # the form of the layers, one of :data:`fmpq_fx.onnx.forms.FORMS`
    opset: int
    parts: tuple[PartFile, ...]
    layers: tuple[LayerRun, ...]
    nominal_bytes: float  # parameters * bits / 8 over the layers that are in parts
    checked_with: dict[str, str]  # the runtimes that ran the graphs, with their versions

    @property
    def bytes(self) -> int:
        """Bytes of all graphs."""
        return sum(part.bytes for part in self.parts)

    @property
    def stored_bytes(self) -> float:
        """Bytes of the weights of all layers in parts, in their containers."""
        return sum(layer.bytes for layer in self.layers if layer.part is not None)

    def __str__(self) -> str:
        rows = [
            (r.site, r.part or "-", r.bits or "float", r.runs, r.stored, f"{r.bytes:,.0f}", r.why)
            for r in self.layers
        ]
        table = tabulate(rows, ["layer", "part", "bits", "runs", "stored", "bytes", "why"])
        ran = [f"{name} {version}" for name, version in self.checked_with.items()]
        checked = f"run by {' and '.join(ran)}" if ran else "no runtime has run them"
        for part in self.parts:
            checked += "".join(f"; {part.name} is not to be used: {why}" for why in part.unusable.values())
        return (
            f"{table}\n\n{len(self.parts)} graphs, {self.bytes:,} bytes; weights {self.stored_bytes:,.0f}, nominal "
            f"{self.nominal_bytes:,.0f}; {checked}"
        )

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "OnnxManifest":
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']}; this fmpq_fx reads {VERSION}")
        fields["fingerprints"] = tuple(fields["fingerprints"])
        fields["parts"] = tuple(PartFile(**part) for part in fields["parts"])
        fields["layers"] = tuple(LayerRun(**layer) for layer in fields["layers"])
        return cls(**fields)

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> "OnnxManifest":
        """Return the manifest in ``folder``, after checking that the folder has its files and no others.

        Raises:
            FmpqError: ``folder`` has no export, or a file is missing, altered or foreign.
        """
        path = Path(folder)
        if not (path / NAME).is_file():
            raise FmpqError(f"there is no {NAME} in {folder}; fmpq_fx.export_onnx() writes one")
        manifest = cls.load(path / NAME)
        listed = {part.file for part in manifest.parts}
        found = {entry.name for entry in path.iterdir()} - {NAME}
        for names, words in (
            (listed - found, "lacks"),
            (found - listed, "has files that are not of this export:"),
        ):
            if names:
                raise FmpqError(f"{folder} {words} {', '.join(sorted(names))}; export the model again")
        for part in manifest.parts:
            if Path(part.file).name != part.file or sha256(path / part.file) != part.sha256:
                raise FmpqError(f"{path / part.file} is not what was exported; export the model again")
        return manifest


def sha256(path: Path) -> str:
    """Return the SHA-256 of the file ``path``, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def replacing_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that replaces it when the block ends without an error.

    Raises:
        FmpqError: ``folder`` exists and is neither empty nor only an export.
        FileNotFoundError: the parent of ``folder`` does not exist.
        OSError: the disk cannot be written.
    """
    final = followed(Path(folder))
    if final.exists() and not (final.is_dir() and _holds_an_export_at_most(final)):
        raise FmpqError(f"{folder} is there already and is no export; name another folder")
    if not final.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {folder}: there is no folder {final.parent}; create it")
    beside = final.absolute().parent
    with writing(folder), tempfile.TemporaryDirectory(prefix=".fmpq-fx-", dir=beside) as name:
        new, old = Path(name) / "new", Path(name) / "old"
        new.mkdir()
        yield new
        if final.exists():
            final.rename(old)
        new.rename(final)


def _holds_an_export_at_most(folder: Path) -> bool:
    """Say whether ``folder`` has nothing but exported graphs, so that replacing it loses nothing else."""
    others = [entry for entry in folder.iterdir() if entry.name != NAME]
    return not others or ((folder / NAME).is_file() and all(entry.suffix == ".onnx" for entry in others))
