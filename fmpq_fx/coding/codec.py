"""The codec: one object that says how a model codes, and in which order what changes that comes.

``convert()`` and ``load_codec()`` return it. It is a model of the user's own class: its class is made from
:class:`Codec` and that class, so that everything that the user's class has is there under its own name, the state
dict is the same, and ``isinstance`` says so. Only ``forward``, ``compress`` and ``decompress`` come from here. They
run the methods of the user's class, on a shallow copy of the codec in which other modules stand where this is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from compressai.entropy_models import EntropyModel
from torch import Tensor, nn

from fmpq_fx.coding import wavefront
from fmpq_fx.coding.arithmetic import default_dtype
from fmpq_fx.coding.array_model import array_model
from fmpq_fx.coding.choosers import Chooser, Choosing, ChosenInput
from fmpq_fx.coding.string_coder import CheckedCoder, CheckedModel, unnoted
from fmpq_fx.coding.tiles import Tiled, Transform, untiled
from fmpq_fx.errors import FmpqError
from fmpq_fx.passes.lower.entropy_path import compares_scales
from fmpq_fx.passes.swap import shallow_copy, subclass, with_replaced
from fmpq_fx.quant import QuantizedLayer


@dataclass(frozen=True)
class Settings:
    """How a codec runs. Modules are named as in the codec; one that is not named runs as it is."""

    exact: bool = (
        False  # what chooses the CDFs computes in integers, so that float32 and float64 code the same
    )
    backend: Mapping[str, nn.Module] = field(default_factory=dict)  # what runs in the place of a module
    tiles: Mapping[str, Transform] = field(
        default_factory=dict
    )  # what runs in tiles, and what is known of it
    budget: int = 0  # bytes that a tile may take
    chooser: Chooser | None = None  # chooses the CDFs of one image
    arrays: bool = False  # entropy models code whole arrays, as in files, and not in CompressAI's format


class Codec(nn.Module):
    """A model of the user's class that codes; see this file.

    ::

        forward()     the user's forward()   ┐            ┌ compress(), decompress():
        compress()    the user's compress()  ├─ calls ──► │  entropy models, with a coder that notices damage
        decompress()  the user's decompress()┘            │  coding loops of autoregressive models, exact
                                                          └ all three: transforms
                                                              in tiles, where memory is short, each of which runs
                                                                by the backend, where there is one, or in torch

    Attributes:
        fmpq: the settings.
    """

    fmpq = Settings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the user's class does."""
        return super(Codec, _running(self)).forward(*args, **kwargs)

    def compress(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the user's class does, with guards around CompressAI's entropy coder.

        Raises:
            FmpqError: a latent is so far from its mean that CompressAI's coder would not end.
        """
        with default_dtype(next(self.parameters()).dtype):
            return cast(Any, super(Codec, _coding(self))).compress(*args, **kwargs)

    def decompress(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the user's class does; a string that does not end with its last symbol causes a warning."""
        with default_dtype(next(self.parameters()).dtype):
            return cast(Any, super(Codec, _coding(self))).decompress(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies and pickles make the class again: it is made when it is needed, and has no place of its own."""
        kind, cls = type(self).__bases__
        return _empty, (kind, cls), *super().__reduce_ex__(protocol)[2:]


class AutoregressiveCodec(Codec):
    """A codec of CompressAI's mbt2018, or of a class that codes in its loops: they are replaced by exact ones."""

    def _compress_ar(self, y_hat: Tensor, params: Tensor, *sizes: int) -> bytes:
        height, width, _, padding = sizes
        return wavefront.encode(self._context(), y_hat, params, (height, width), padding)

    def _decompress_ar(self, y_string: bytes, y_hat: Tensor, params: Tensor, *sizes: int) -> None:
        height, width, _, padding = sizes
        wavefront.decode(self._context(), y_string, y_hat, params, (height, width), padding)

    def _context(self) -> wavefront.Context:
        model: Any = self
        return wavefront.Context(
            model.gaussian_conditional, untiled(model.context_prediction), model.entropy_parameters
        )


def codec_of(model: nn.Module, kind: type[Codec] = Codec) -> Codec:
    """Return ``model`` as a codec that shares its modules and tensors, or ``model`` itself if it is one.

    Args:
        model: any model that can code as CompressAI's do.
        kind: of codec.

    Raises:
        FmpqError: the class of ``model`` has no ``compress()`` and ``decompress()``.
    """
    # A compiled model hands out the methods of the one inside it.
    owner = getattr(getattr(model, "compress", None), "__self__", model)
    if isinstance(owner, Codec):
        return owner
    if not can_code(owner):
        raise FmpqError(
            f"a {type(model).__name__} has no compress() and decompress(), so it makes no bitstreams; pass what "
            "convert() or load_codec() returned"
        )
    return cast(Codec, _as(kind, owner))


def can_code(model: nn.Module) -> bool:
    """Say whether the class of ``model`` has CompressAI's ``compress()`` and ``decompress()``."""
    return all(callable(getattr(type(model), name, None)) for name in ("compress", "decompress"))


def with_settings(codec: Codec, **changes: Any) -> Codec:
    """Return a codec that shares everything with ``codec`` but the settings that change."""
    return cast(Codec, shallow_copy(codec, type(codec), fmpq=replace(codec.fmpq, **changes)))


def as_it_runs(codec: nn.Module, name: str) -> nn.Module:
    """Return what runs where ``codec`` has the module ``name``: that module, or what a backend runs in its place."""
    settings = codec.fmpq if isinstance(codec, Codec) else Settings()
    return settings.backend.get(name) or codec.get_submodule(name)


def _running(codec: Codec, others: Mapping[nn.Module, nn.Module] | None = None) -> Codec:
    """Return ``codec`` with what runs in the places of its transforms, and with ``others`` in places of modules."""
    settings, new = codec.fmpq, dict(others or {})
    for name in (*settings.backend, *settings.tiles):
        module = as_it_runs(codec, name)
        if name in settings.tiles:
            module = Tiled(settings.tiles[name], module, settings.budget)
        new[codec.get_submodule(name)] = module
    if not new:
        return codec
    running = cast(Codec, with_replaced(codec, new))
    running.fmpq = Settings(settings.exact)  # its modules are those that run
    return running


def _coding(codec: Codec) -> Codec:
    """Return what :func:`_running` returns, with entropy models whose coder is checked, and whose CDFs are chosen."""
    others: dict[nn.Module, nn.Module] = {}
    chooser = codec.fmpq.chooser
    note = unnoted if chooser is None else chooser.note
    for name, module in codec.named_modules():
        if isinstance(module, EntropyModel) and module.entropy_coder.name == CheckedCoder.name:
            prior = array_model(module, note) if codec.fmpq.arrays else _as(CheckedModel, module, note=note)
            if chooser is not None and compares_scales(module):
                prior = _as(Choosing, prior, chooser=chooser)
            others[module] = prior
        elif chooser is not None and isinstance(module, QuantizedLayer) and module.input_quantizer:
            others[module] = _as(ChosenInput, module, is_float=partial(chooser.is_float, name))
    return _running(codec, others)


def _as(kind: type[nn.Module], module: nn.Module, **attributes: Any) -> nn.Module:
    """Return a twin of ``module`` whose class is a subclass of ``kind`` and of its own."""
    cls = type(module)
    return shallow_copy(module, subclass(cls, kind, cls), **attributes)


def _empty(kind: type[Codec], cls: type[nn.Module]) -> nn.Module:
    return object.__new__(subclass(cls, kind, cls))
