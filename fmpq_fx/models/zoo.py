"""Find a model by its name on the command line."""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compressai.models  # noqa: F401  (fills the registry)
from compressai.registry import MODELS
from compressai.zoo import image_models
from torch import nn

from fmpq_fx import samples
from fmpq_fx.errors import FmpqError
from fmpq_fx.models import checkpoint as weights
from fmpq_fx.storage.kinds import kind_of


def model_names() -> list[str]:
    """Return the names of CompressAI's image models that :func:`load_model` knows, sorted."""
    others = ("ssf2020", "-pcc-")  # for video and for point clouds
    names = set(image_models) | set(MODELS)
    return sorted(name for name in names if not any(other in name for other in others))


def load_model(
    spec: str,
    *,
    quality: int | None = None,
    metric: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Return the model that ``spec`` names, in evaluation mode.

    Args:
        spec: "sample", the trained model of this package; a name of CompressAI's zoo ("mbt2018-mean"); or
            "package.module:callable", which is called without arguments and returns a model.
        quality: quality of CompressAI's pretrained weights, 1 … 8 (1 … 6 for cheng2020), which it downloads once.
        metric: distortion that these were trained for, "mse" or "ms-ssim"; None is "mse".
        checkpoint: a file of trained weights to load instead: a state dict, or a dict that holds one under
            "state_dict", as CompressAI's training script saves it, or as other programs do
            (:mod:`fmpq_fx.models.checkpoint`).

    Raises:
        ValueError: there is no such model, or neither quality nor checkpoint for a model of the zoo, or a quality for a
            model that does not get CompressAI's weights.
        FmpqError: importing the module, the download or the checkpoint fails.
    """
    state = None if checkpoint is None else weights.read(Path(checkpoint))
    if spec == "sample":
        if (quality, metric, state) != (None, None, None):
            raise ValueError(
                "'sample' is trained already; --quality, --metric and --checkpoint are for models of the zoo"
            )
        sample: nn.Module = samples.model()
        return sample
    if quality is not None and (state is not None or ":" in spec):
        weights_of = spec if state is None else checkpoint
        raise ValueError(
            f"--quality {quality} chooses among CompressAI's pretrained weights, and those of {weights_of} are wanted; "
            "leave --quality out"
        )
    if state is not None:
        return model_of_state(spec, state)
    return model_factory(spec)() if ":" in spec else _pretrained(_known(spec), quality, metric)


def model_of_state(spec: str, state: dict[str, Any]) -> nn.Module:
    """Return the model that ``spec`` names (see :func:`load_model`) with the weights ``state``, in evaluation mode.

    Raises:
        ValueError: there is no such model.
        FmpqError: importing the module fails, or ``state`` is of another model.
    """
    if spec == "sample":
        return _loaded(samples.model(), state, spec)
    if ":" in spec:
        return _loaded(model_factory(spec)(), state, spec)
    return _from_state_dict(_known(spec), state)


def zoo_name(model: nn.Module) -> str | None:
    """Return a name by which :func:`model_of_state` makes a model of the class of ``model``, or None."""
    return next((name for name in model_names() if MODELS.get(name) is type(model)), None)


def _known(spec: str) -> str:
    if spec not in model_names():
        expected = f"'sample', 'package.module:callable', or one of {', '.join(model_names())}"
        if Path(spec).is_file():
            kind = kind_of(spec)
            raise ValueError(f"{spec} is {kind.what}, no model; {kind.remedy}. A model is {expected}")
        raise ValueError(f"there is no model and no file {spec!r}; pass {expected}")
    return spec


def imported(spec: str, what: str) -> Callable[..., Any]:
    """Return the callable that "package.module:callable" names; ``what`` it makes is said in errors.

    Raises:
        ValueError: ``spec`` has another form.
        FmpqError: it cannot be imported.
    """
    module_name, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"expected package.module:callable, got {spec!r}")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's code may raise anything
        raise FmpqError(f"cannot get {what} from {spec!r}: {type(error).__name__}: {error}") from error
    return found


def model_factory(spec: str) -> Callable[[], nn.Module]:
    """Return a function that makes a model by the callable that "package.module:callable" names.

    Raises:
        ValueError: ``spec`` has another form.
        FmpqError: it cannot be imported; when called, it fails or returns no model.
    """
    make = imported(spec, "a model")

    def call() -> nn.Module:
        try:
            model = make()
        except Exception as error:  # the user's code may raise anything
            raise FmpqError(f"cannot get a model from {spec!r}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise FmpqError(f"{spec} returned a {type(model).__name__}; it must return a torch.nn.Module")
        return model.eval()

    return call


def _pretrained(spec: str, quality: int | None, metric: str | None) -> nn.Module:
    if spec not in image_models:
        raise ValueError(f"CompressAI has no pretrained weights for {spec}; pass --checkpoint")
    if quality is None:
        raise ValueError(
            f"pass --quality to get CompressAI's pretrained {spec}, or --checkpoint for your own"
        )
    metric = metric or "mse"
    try:
        model: nn.Module = image_models[spec](quality=quality, metric=metric, pretrained=True, progress=True)
    except OSError as error:  # URLError is one
        raise FmpqError(
            f"CompressAI's weights for {spec}, quality {quality}, metric {metric}, cannot be downloaded ({error}); "
            "pass --checkpoint with a file that you have"
        ) from error
    return model.eval()


def sized(name: str, state: dict[str, Any]) -> nn.Module:
    """Return a model of the zoo with the sizes of the tensors ``state``, and initial weights.

    The ``from_state_dict`` of its class reads the sizes from ``state``, but also loads it, and fails without CDF
    tables. So it is called with a stand-in for the class that makes the model and does not load.
    """

    class Unloaded:
        def __init__(self, *args: Any, **kwargs: Any):
            self.model = MODELS[name](*args, **kwargs)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    model: nn.Module = MODELS[name].from_state_dict.__func__(Unloaded, state).model
    return model


@functools.cache
def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Return the names in the state dict of a class of the zoo, which are the same for all sizes."""
    sizes = {"N": 8, "M": 320}  # small sizes; ELIC needs 320 latent channels, which it divides unevenly
    taken = inspect.signature(cls).parameters
    return tuple(cls(**{key: size for key, size in sizes.items() if key in taken}).state_dict())


def _from_state_dict(name: str, state: dict[str, Any]) -> nn.Module:
    names = _names(MODELS[name])
    found = weights.renamed(state, names)
    try:
        model = sized(name, found)
    except (RuntimeError, KeyError, IndexError) as error:
        raise FmpqError(f"the checkpoint is not of a {name}: {weights.differences(found, names)}") from error
    return weights.load(model, found, f"a {name}").eval()


def _loaded(model: nn.Module, state: dict[str, Any], spec: str) -> nn.Module:
    return weights.load(model, weights.renamed(state, model.state_dict()), spec)
