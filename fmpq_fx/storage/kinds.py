"""Recognize the kind of a file by its first bytes, to tell the user what to do with it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_HEAD = 4096  # bytes


@dataclass(frozen=True)
class Kind:
    """A kind of file, in the words of a message."""

    what: str  # completes "the file is …"
    remedy: str  # what to do with the file


EMPTY = Kind("empty", "get it, or write it, again")
POINTER = Kind("a pointer of Git LFS to the file", "'git lfs pull' gets the file itself")
PAGE = Kind("a web page", "get the file that the page shows, by the link to its raw content")
ARCHIVE = Kind("a compressed archive", "unpack it, and pass a file of it")
CODED_IMAGE = Kind("a coded image", "'fmpq-fx decode' reads it")
MODEL_FILE = Kind(
    "a model file (.fmpq)",
    "'fmpq-fx evaluate', 'inspect' and 'export onnx' read it, 'encode' and 'decode' with -m; 'prepare' and 'finetune' "
    "begin with other files",
)
STATE_FILE = Kind(
    "a state file of 'fmpq-fx prepare' or 'finetune'",
    "'finetune', 'evaluate' and 'export' read it; 'export model' makes a model file of it",
)
CHECKPOINT = Kind(
    "a checkpoint of torch.save",
    "'fmpq-fx prepare MODEL --checkpoint' reads it, and writes a state with --out",
)
SAFETENSORS = Kind("a safetensors file of another program", CHECKPOINT.remedy)
UNKNOWN = Kind("in no format that is known here", "get it, or write it, again")

_SIGNS: list[tuple[Kind, Callable[[bytes], bool]]] = [
    (EMPTY, lambda head: not head.strip(b"\0 \r\n\t")),
    (POINTER, lambda head: head.startswith(b"version https://git-lfs")),
    (
        PAGE,
        lambda head: (
            head.lstrip(b"\xef\xbb\xbf \r\n\t")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml"))
        ),
    ),
    (
        ARCHIVE,
        lambda head: head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")),
    ),
    (CODED_IMAGE, lambda head: head.startswith(b"\x89FMI")),
    (MODEL_FILE, lambda head: _is_safetensors(head) and b"fmpq_fx model" in head),
    (STATE_FILE, lambda head: _is_safetensors(head) and b"fmpq_fx state" in head),
    (SAFETENSORS, lambda head: _is_safetensors(head)),
    (
        CHECKPOINT,
        lambda head: head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    ),
]


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Return the kind of the file ``path``, by its first bytes alone: the file may still be damaged."""
    with Path(path).open("rb") as file:
        head = file.read(_HEAD)
    return next((kind for kind, matches in _SIGNS if matches(head)), UNKNOWN)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27
