"""Codecs from pixels to bytes and back: model files, the float model, and the formats that Pillow writes."""

import copy
import importlib
import io
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor, nn

from fmpq_fx import decode, encode, load_codec
from fmpq_fx.coding.codec import codec_of
from fmpq_fx.coding.frame import Frame, stride_of

Pixels = NDArray[np.uint8]  # (height, width, 3)


class Side(ABC):
    """A codec from pixels to bytes and back."""

    name: str
    loads = True  # whether there is something to load

    @abstractmethod
    def load(self) -> Any:
        """Return the codec, loaded from a file."""

    @abstractmethod
    def encode(self, pixels: Pixels) -> Any:
        """Return the coded image, for :meth:`decode`."""

    @abstractmethod
    def decode(self, coded: Any) -> Pixels:
        """Return the image."""

    def size(self, coded: Any) -> int:
        """Return the number of bytes of a coded image."""
        return len(coded)


class Ours(Side):
    """A model file, run by a backend."""

    def __init__(self, file: Path, backend: str, threads: int):
        self.name = f"ours, {backend}"
        self.options: dict[str, Any] = {} if backend == "torch" else {"backend": backend, "threads": threads}
        self.file = file
        self.codec = self.load()

    def load(self) -> nn.Module:
        """Return the codec in the file."""
        return load_codec(self.file, **self.options)

    def encode(self, pixels: Pixels) -> bytes:
        """Return a ``.fmi`` file."""
        return encode(self.codec, tensor_of(pixels))

    def decode(self, coded: bytes) -> Pixels:
        """Return the image in a ``.fmi`` file."""
        return pixels_of(decode(self.codec, coded))


class Float(Side):
    """The float model with CompressAI's own coding, and no guards."""

    name = "float, CompressAI"

    def __init__(self, model: nn.Module, folder: Path):
        self.model: Any = copy.deepcopy(model)
        self.stride = stride_of(codec_of(model), 3)
        self.file = folder / "float.pth"
        torch.save(self.model.state_dict(), self.file)

    def load(self) -> nn.Module:
        """Read the weights of the model."""
        self.model.load_state_dict(torch.load(self.file, weights_only=True))
        loaded: nn.Module = self.model
        return loaded

    @torch.no_grad()
    def encode(self, pixels: Pixels) -> tuple[Frame, dict[str, Any]]:
        """Return the frame of the image and the result of compress()."""
        height, width, _ = pixels.shape
        frame = Frame(height, width, self.stride)
        return frame, self.model.compress(frame.around(tensor_of(pixels)[None]))

    @torch.no_grad()
    def decode(self, coded: tuple[Frame, dict[str, Any]]) -> Pixels:
        """Return the image that decompress() decodes."""
        frame, compressed = coded
        decoded = self.model.decompress(compressed["strings"], compressed["shape"])["x_hat"]
        return pixels_of(frame.inside(decoded)[0])

    def size(self, coded: tuple[Frame, dict[str, Any]]) -> int:
        """Return the bytes of all strings."""
        return sum(len(strings[0]) for strings in coded[1]["strings"])


class Pillow(Side):
    """A format of Pillow's, or of a plugin of it."""

    loads = False

    def __init__(self, title: str, form: str, **options: Any):
        self.name, self.form, self.options = title, form, options

    def at(self, quality: int) -> "Pillow":
        """Return this side with another ``quality``, 0 to 100."""
        return Pillow(f"{self.name}, quality {quality}", self.form, **{**self.options, "quality": quality})

    def load(self) -> None:
        """Do nothing."""

    def encode(self, pixels: Pixels) -> bytes:
        """Return a file of this format."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, self.form, **self.options)
        return file.getvalue()

    def decode(self, coded: bytes) -> Pixels:
        """Return the image in a file of this format."""
        return np.asarray(Image.open(io.BytesIO(coded), formats=[self.form]).convert("RGB"))


def pillow_sides(threads: int) -> list[Pillow]:
    """Return the formats that are there, with as many threads, and say which are not."""
    found = []
    try:
        jxl: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
        workers = threads if threads > 1 else 0  # beside the thread that calls
        jxl.DECODE_THREADS = workers
        title = f"JPEG XL (pillow-jxl-plugin {metadata.version('pillow-jxl-plugin')})"
        found.append(Pillow(title, "JXL", num_threads=workers))
    except ImportError:
        print("JPEG XL is left out: pillow-jxl-plugin is not installed (pip install pillow-jxl-plugin)")
    if features.check("avif"):
        avif: Any = importlib.import_module("PIL.AvifImagePlugin")
        avif.DEFAULT_MAX_THREADS = threads
        found.append(Pillow(f"AVIF (libavif {features.version('avif')})", "AVIF"))
    else:
        print("AVIF is left out: this Pillow comes without it; 11.3 and later ones have it")
    return found


def tensor_of(pixels: Pixels) -> Tensor:
    """Return an image as tensor (3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def pixels_of(x: Tensor) -> Pixels:
    """Return the 8-bit pixels of ``x`` (3, H, W) in [0, 1]."""
    found: Pixels = (255 * x).round_().clamp_(0, 255).byte().permute(1, 2, 0).numpy()
    return found
