"""The container of model files: safetensors, with a format, a version and a checksum over every byte."""

import hashlib
import json
import lzma
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.files import replacing
from fmpq_fx.storage.kinds import MODEL_FILE, SAFETENSORS, UNKNOWN, kind_of

FORMAT = "fmpq_fx model"
VERSION = 3
"""The version that is written and read. Up to version 2, weights were coded by CompressAI's coder."""

_BLANK = "0" * 64  # stands in the place of the checksum while that is computed
_PACKED_LIMIT = 1 << 26  # the most bytes of a packed text or table
_DICTIONARY = 1 << 12, 1 << 26  # bytes of LZMA's smallest dictionary, and of that of its strongest preset


@dataclass(frozen=True)
class Container:
    """The contents of a model file."""

    about: dict[str, Any]  # the metadata, from its writer
    data: dict[str, bytes]  # its parts, by name
    size: int  # bytes of the file

    @property
    def overhead(self) -> int:
        """Bytes that belong to no part: the header."""
        return self.size - sum(map(len, self.data.values()))


def write(path: str | os.PathLike[str], about: dict[str, Any], data: dict[str, bytes]) -> None:
    """Write the parts ``data`` and the metadata ``about``, which must fit JSON, to ``path``, all of it or nothing.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    head = json.dumps(
        {"format": FORMAT, "version": VERSION, "sha256": _BLANK, **about}, separators=(",", ":")
    )
    arrays = {name: np.frombuffer(part, np.uint8) for name, part in data.items()}
    written = safetensors.numpy.save(arrays, metadata={"fmpq_fx": head})
    written = written.replace(_BLANK.encode(), hashlib.sha256(written).hexdigest().encode(), 1)
    with replacing(path) as file:
        file.write(written)


def read(path: str | os.PathLike[str]) -> Container:
    """Return the contents of the file that :func:`write` wrote to ``path``.

    Raises:
        FmpqError: there is no such file, or it is no model file, of another version, or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FmpqError(f"there is no model file {file}; fmpq_fx.save() and 'fmpq-fx export model' write one")
    data = file.read_bytes()
    if (kind := kind_of(file)) not in (MODEL_FILE, SAFETENSORS, UNKNOWN):
        raise FmpqError(f"{file} is {kind.what}, and no model file that fmpq_fx.save() wrote; {kind.remedy}")
    try:
        parts = {name: bytes(part["data"]) for name, part in safetensors.deserialize(data)}
        # safetensors has checked the header by now: it is small, flat and JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get("fmpq_fx", "{}"))
        found = about.get("format"), about.get("version")
    except (SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise FmpqError(f"{file} is damaged, or no model file that fmpq_fx.save() wrote: {error}") from error
    if found[0] != FORMAT:
        raise FmpqError(
            f"{file} is a safetensors file, but no model file: its format is {found[0]!r}, expected {FORMAT!r}, as "
            "fmpq_fx.save() and 'fmpq-fx export model' write it"
        )
    if found[1] != VERSION:
        raise FmpqError(
            f"{file} has version {found[1]!r} of the format, and this fmpq_fx reads version {VERSION} alone; write the "
            "file again, with fmpq_fx.save() or 'fmpq-fx export model', or install the fmpq_fx that wrote it"
        )
    claimed = str(about.get("sha256")).encode(errors="replace")
    if hashlib.sha256(data.replace(claimed, _BLANK.encode(), 1)).hexdigest().encode() != claimed:
        raise FmpqError(f"{file} is damaged: its checksum is not that of its content; get or write it again")
    return Container(about, parts, len(data))


def packed(data: bytes) -> bytes:
    """Return ``data`` compressed by LZMA."""
    # A dictionary longer than the data does not help, and allocating it takes longer than compressing small data.
    smallest, largest = _DICTIONARY
    dictionary = min(max(smallest, len(data)), largest)
    strongest = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return lzma.compress(data, filters=[strongest])


def unpacked(data: bytes, limit: int = _PACKED_LIMIT) -> bytes:
    """Return the bytes that :func:`packed` compressed.

    Raises:
        FmpqError: ``data`` is damaged, or the result would have more than ``limit`` bytes.
    """
    decompressor = lzma.LZMADecompressor(memlimit=1 << 27)
    try:
        result = decompressor.decompress(data, max_length=limit + 1)
    except lzma.LZMAError as error:
        raise FmpqError(f"a packed part is damaged: {error}") from error
    if not decompressor.eof or len(result) > limit or decompressor.unused_data:
        raise FmpqError(f"a packed part does not end within {limit} bytes")
    return result
