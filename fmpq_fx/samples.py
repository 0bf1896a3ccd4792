"""Sample data, so that the package runs anywhere: a trained model, and photographs for it."""

import json
import re
from importlib import resources
from typing import Any

import skimage.data
import torch
from compressai.models import ScaleHyperprior
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

_DATA = resources.files("fmpq_fx.data")
_NAME = re.compile(r"scale-hyperprior-n\d+-m\d+-lmbda(\d\.\d{4})\.safetensors")

# benchmarks/pack_model.py makes these files; further ones are found here.
_FILES = {float(match[1]): match[0] for entry in _DATA.iterdir() if (match := _NAME.fullmatch(entry.name))}

LMBDAS: tuple[float, ...] = tuple(sorted(_FILES))


def model(lmbda: float = 0.013) -> ScaleHyperprior:
    """Return a trained scale hyperprior, in eval mode and ready to code (its CDF tables are made).

    It is small (N=64, M=96) and was trained for hours, not days: a real codec with a real rate-distortion
    curve, but a few dB short of CompressAI's published models. Trained on BSDS500 (research use).

    Args:
        lmbda: the weight of the distortion that it was trained with, one of `LMBDAS`.

    Raises:
        ValueError: there is no model for this ``lmbda``.
    """
    if lmbda not in _FILES:
        raise ValueError(f"no sample model for lmbda={lmbda}; there is one for {', '.join(map(str, LMBDAS))}")
    with resources.as_file(_DATA / _FILES[lmbda]) as path, safe_open(path, framework="pt") as stored:
        about = json.loads(stored.metadata()["model"])
        weights = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118 (no dict)
    codec = ScaleHyperprior(about["N"], about["M"])
    # The file only has parameters; constants and empty tables come from the new model.
    codec.load_state_dict({**dict(codec.named_buffers()), **weights})
    codec.update()
    return codec.eval()


def photos() -> dict[str, Tensor]:
    """Return scikit-image's four colour photographs, the default calibration, by name.

    They lie in scikit-image's wheel: nothing is downloaded. Each is (3, H, W), float32 in [0, 1], from
    300 x 451 to 512 x 512 pixels.
    """
    names = ("astronaut", "coffee", "chelsea", "rocket")
    return {name: _tensor(getattr(skimage.data, name)()) for name in names}


def held_out_photos() -> dict[str, Tensor]:
    """Return colour photographs from scikit-image's wheel that are not among `photos`, to test on, by name.

    "motorcycle" is an everyday scene; the others come from a space telescope, an eye clinic and a microscope.
    Each is (3, H, W), float32 in [0, 1], from 500 x 741 to 1411 x 1411 pixels.
    """
    left, _, _ = skimage.data.stereo_motorcycle()
    names = ("hubble_deep_field", "retina", "immunohistochemistry")
    others = {name: _tensor(getattr(skimage.data, name)()) for name in names}
    return {"motorcycle": _tensor(left), **others}


def _tensor(pixels: NDArray[Any]) -> Tensor:
    """Return uint8 pixels (H, W, 3) as (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255
