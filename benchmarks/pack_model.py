"""Make a small file of a trained model: one of the sample models of `fmpq_fx.samples`, or of those in `models/`.

    python benchmarks/pack_model.py CHECKPOINT OUT

CHECKPOINT is what `train_models.py` writes: a dict of arch, N, M, lmbda, steps and state_dict. OUT is a safetensors
file: the weights of convolutions in float16, which moves the RD loss by less than 1e-4 of itself; all other parameters,
which are few and sensitive, in float32. Constants and CDF tables are left out: a new model has the first, and its
update() makes the second. The same checkpoint gives the same bytes. `--checkpoint` of the command line takes the file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from train_models import MODELS

from fmpq_fx.storage.files import replacing

NOTE = "trained on BSDS500 (research use)"

# How CompressAI up to 1.2.6 spells the parameters of its entropy bottleneck. Later versions rename these when
# they load them, but 1.2.6 does not know the later names: so these are the ones that every version reads.
OLD_NAMES = {
    "entropy_bottleneck.matrices.": "entropy_bottleneck._matrix",
    "entropy_bottleneck.biases.": "entropy_bottleneck._bias",
    "entropy_bottleneck.factors.": "entropy_bottleneck._factor",
}


def pack(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store for ``checkpoint``, by name, and the metadata of the file.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    if checkpoint["arch"] not in MODELS:
        raise ValueError(
            f'the checkpoint is of a model of arch "{checkpoint["arch"]}"; expected one of {", ".join(MODELS)}'
        )
    model = MODELS[checkpoint["arch"]](checkpoint["N"], checkpoint["M"])
    model.load_state_dict(checkpoint["state_dict"])
    tensors = {}
    for name, parameter in model.named_parameters():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        # Only convolutions call theirs "weight".
        dtype = torch.float16 if name.endswith(".weight") else torch.float32
        tensors[name] = parameter.detach().to(dtype)
    about = {key: checkpoint[key] for key in ("N", "M", "lmbda", "steps")}
    about |= {"arch": type(model).__name__, "note": NOTE}
    # One entry, because safetensors writes several in an order that changes from run to run.
    return tensors, {"model": json.dumps(about, sort_keys=True)}


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description="Make a small file of a trained model.")
    parser.add_argument("checkpoint", type=Path, help="what training wrote, a file of torch.save")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    checkpoint = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    tensors, metadata = pack(checkpoint)
    with replacing(arguments.out) as file:
        file.write(safetensors.torch.save(tensors, metadata))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
