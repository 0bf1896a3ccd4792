"""Checkpoints as people have them: find the weights in the file, give them the model's names, and load them."""

import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from compressai.entropy_models import EntropyModel
from safetensors import SafetensorError
from torch import Tensor, nn

from fmpq_fx.errors import FmpqError
from fmpq_fx.storage.kinds import CHECKPOINT, SAFETENSORS, kind_of

# The keys under which training scripts keep the weights; the first that exists is taken. Averages come last: they are a
# second model.
_PLACES = (
    *(
        "state_dict",
        "model_state_dict",
        "model",
        "network",
        "net",
        "module",
        "generator",
        "weights",
        "params",
    ),
    *("params_ema", "ema_state_dict", "model_ema", "ema"),
)
_WRAPPERS = {"module", "_orig_mod"}  # parts of names from DataParallel and torch.compile

# CompressAI's earlier names: parameters of entropy bottlenecks, and a branch of residual blocks.
_OLD = re.compile(r"(?<![^.])_(matri|bias|factor)(?:x|ces\.|es\.|s\.)?(\d+)$")
_CURRENT = {"matri": "matrices", "bias": "biases", "factor": "factors"}

_TABLES = ("_quantized_cdf", "_offset", "_cdf_length")  # update() makes them of the parameters
_SHOWN = 3  # names of each side that a message lists


def read(path: Path) -> dict[str, Tensor]:
    """Return the state dict in the file ``path``, with the names in the file.

    Raises:
        FmpqError: there is no such file, or it is no checkpoint; the message says what it is.
    """
    if not path.exists():
        raise FmpqError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise FmpqError(f"{path} is a folder; pass the file of a checkpoint in it")
    kind = kind_of(path)
    if kind is SAFETENSORS:
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise FmpqError(f"{path} is damaged: {error}; get it, or write it, again") from error
    if kind is not CHECKPOINT:
        raise FmpqError(f"{path} is {kind.what}, not a checkpoint as torch.save writes it; {kind.remedy}")
    content = read_tensors(path)
    if isinstance(content, dict) and str(content.get("format", "")).startswith("fmpq_fx"):
        raise FmpqError(
            f"{path} is a training of 'fmpq-fx finetune' that was interrupted; the same command goes on from it"
        )
    state = _state_dict(content)
    if not state:
        raise FmpqError(f"{path} holds no state dict; expected one, or a dict with one under 'state_dict'")
    return state


def read_tensors(path: Path) -> Any:
    """Return the content that ``torch.save`` wrote to ``path``, on the CPU: only tensors and plain values, no code.

    Raises:
        FmpqError: the file holds other objects, or is damaged; the message names ``path``.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message names the class, and a way to run its code all the same.
        named = re.search(r"(?:GLOBAL|type|class) [`']?([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        what = f"objects of {named[1]}" if named else "objects"
        raise FmpqError(
            f"{path} holds {what} beside tensors, and reading those could run any code; where it was written, save the "
            "weights alone: torch.save(model.state_dict(), file)"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AssertionError) as error:
        raise FmpqError(
            f"{path} is damaged, or not a file that torch.save wrote; get it, or write it, again"
        ) from error


def _state_dict(content: Any, depth: int = 3) -> dict[str, Tensor]:
    """Return the tensors in ``content`` that are most likely a model's state dict, or none."""
    if not isinstance(content, Mapping) or depth == 0:
        return {}
    for place in _PLACES:
        if isinstance(content.get(place), Mapping) and (found := _state_dict(content[place], depth - 1)):
            return found
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def renamed(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of ``state`` that belong to one model, under the names that are ``expected``.

    Wrappers and a common prefix (``module.``, ``model.``) are removed, and names of earlier versions of CompressAI
    replaced, if that makes names fit. Tensors without the prefix, those of a loss for instance, are left out.
    """
    wanted = set(expected)
    plain = {_plain(name, wanted): value for name, value in state.items()}
    prefixes: Counter[str] = Counter()
    for name in plain:
        parts = name.split(".")
        tails = ((i, ".".join(parts[i:])) for i in range(len(parts)))
        prefixes.update("".join(f"{part}." for part in parts[:i]) for i, tail in tails if tail in wanted)
    if not prefixes:
        return plain
    most = max(prefixes.values())
    prefix = min((p for p in prefixes if prefixes[p] == most), key=lambda p: ("ema" in p, len(p)))
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def _plain(name: str, wanted: set[str]) -> str:
    """Return ``name`` without wrappers and with CompressAI's present names, unless the model has ``name`` itself."""
    if name in wanted:
        return name
    kept = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    today = _OLD.sub(lambda match: f"{_CURRENT[match[1]]}.{match[2]}", kept)
    return today.replace(".downsample.", ".skip.") if not any("downsample" in w for w in wanted) else today


def load(model: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Load ``state`` into ``model``, and return ``model``.

    CDF tables may have any size. Tables that the state lacks are emptied, since the present ones are of other weights;
    update() makes them again. Other buffers of CompressAI's own layers are constants, and may be missing.

    Args:
        model: a model whose weights have the right shapes.
        state: its parameters and buffers under its own names, see :func:`renamed`.
        what: the name of the model in messages.

    Raises:
        FmpqError: names or shapes differ; the message lists a few of each side.
    """
    stored, names = dict(state), model.state_dict().keys()
    for prefix, module in model.named_modules():
        name = f"{prefix}." if prefix else ""
        if isinstance(module, EntropyModel):
            _make_room(module, name, stored)
        if type(module).__module__.startswith("compressai."):
            for key, value in module.named_buffers(recurse=False):
                if name + key in names:
                    stored.setdefault(name + key, value)
    if complaint := misfit(stored, model.state_dict()):
        raise FmpqError(f"the checkpoint is not of {what}: {complaint}")
    nn.Module.load_state_dict(model, stored)
    return model


def misfit(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return why the state ``stored`` does not fit a model with the state ``own``, by name or shape; "" if it fits."""
    complaint = differences(stored, own)
    others = [name for name in own if name in stored and own[name].shape != stored[name].shape]
    if complaint or not others:
        return complaint
    there, here = (" x ".join(map(str, of[others[0]].shape)) for of in (stored, own))
    of_others = f", and {len(others) - 1} more have other shapes" if len(others) > 1 else ""
    return f"{others[0]} is {there} there and {here} in the model{of_others}"


def _make_room(module: nn.Module, prefix: str, stored: dict[str, Tensor]) -> None:
    """Give the tables of an entropy model the sizes of the ``stored`` ones, or empty them if some are missing."""
    whole = all(prefix + key in stored for key in _TABLES)
    for key, value in dict(module.named_buffers(recurse=False)).items():
        if key in _TABLES and not whole:
            stored[prefix + key] = value.new_empty(0)
        if key in (*_TABLES, "scale_table") and prefix + key in stored:
            module.register_buffer(key, stored[prefix + key].detach().clone())


def differences(names: Collection[str], expected: Collection[str]) -> str:
    """Return a text with a few ``expected`` names that are missing and a few that are not expected; "" if none."""
    has, lacks = set(names) - set(expected), set(expected) - set(names)
    sides = [f"it lacks {_some(name for name in expected if name in lacks)}"] if lacks else []
    sides += (
        [f"it has {_some(name for name in names if name in has)}, which the model has not"] if has else []
    )
    return "; ".join(sides)


def _some(names: Iterable[str]) -> str:
    """Return the first of ``names``, and the number of others, as a text."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
