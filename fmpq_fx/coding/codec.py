"""The codec: a model that codes, and the one place that decides which modules run while it does.

``convert()`` and ``load_codec()`` return it. It is a model of the user's own class: its class inherits from
:class:`Codec` and from that class, so that it has all attributes of the user's class and the same state dict. Only
``forward``, ``compress`` and ``decompress`` are from here. They run the methods of the user's class on a shallow copy
of the codec, in which some modules are replaced.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from fmpq_fx.exact.layers import without_autocast
from fmpq_fx.passes.lower.entropy_path import compares_scales
from fmpq_fx.passes.swap import shallow_copy, subclass, with_replaced
from fmpq_fx.quant import QuantizedLayer


@dataclass(frozen=True)
class CodecSettings:
    """The way a codec runs. Modules are named as in the codec; a module that is not named runs unchanged."""

    # Whether the entropy path computes in integers, so that float32 and float64 code the same.
    exact: bool = False
    # Module -> the module that runs in its place.
    backend: Mapping[str, nn.Module] = field(default_factory=dict)
    # Module that runs in tiles -> its description.
    tiles: Mapping[str, Transform] = field(default_factory=dict)
    budget: int = 0  # bytes that a tile may take
    chooser: Chooser | None = None  # chooses the CDFs of one image
    arrays: bool = False  # entropy models code whole arrays, as in files, and not in CompressAI's format


class Codec(nn.Module):
    """A model of the user's class that codes; see the text at the top of this file.

    ::

        forward()     the user's forward()   ┐            ┌ in compress() and decompress():
        compress()    the user's compress()  ├─ calls ──► │  entropy models with a coder that notices damage
        decompress()  the user's decompress()┘            │  exact coding loops of autoregressive models
                                                          └ in all three: transforms,
                                                              in tiles if memory is short,
                                                                run by the backend if there is one, or by torch

    Attributes:
        fmpq: the settings.
    """

    fmpq = CodecSettings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the user's forward."""
        return super(Codec, _running(self)).forward(*args, **kwargs)

    def compress(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the user's ``compress()`` returns; CompressAI's entropy coder is guarded.

        Raises:
            FmpqError: a latent is so far from its mean that CompressAI's coder would not end.
        """
        with self._arithmetic():
            return cast(Any, super(Codec, _coding(self))).compress(*args, **kwargs)

    def decompress(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the user's ``decompress()`` returns; warn if a string does not end with its last symbol."""
        with self._arithmetic():
            return cast(Any, super(Codec, _coding(self))).decompress(*args, **kwargs)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Within the block, nothing has another type than the parameters; the decoder may run without autocast."""
        parameter = next(self.parameters())
        with default_dtype(parameter.dtype), without_autocast(parameter.device):
            yield

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies and pickles make the class again: it is made at run time and cannot be imported."""
        kind, cls = type(self).__bases__
        return _empty, (kind, cls), *super().__reduce_ex__(protocol)[2:]


class AutoregressiveCodec(Codec):
    """A codec of CompressAI's mbt2018, or of a class that codes in its loops, with exact loops instead."""

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
        kind: the class of the codec.

    Raises:
        FmpqError: the class of ``model`` has no ``compress()`` and ``decompress()``.
    """
    # A compiled model returns the methods of the model inside it.
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
    """Return the module that runs as the module ``name`` of ``codec``: itself, or the backend's."""
    settings = codec.fmpq if isinstance(codec, Codec) else CodecSettings()
    return settings.backend.get(name) or codec.get_submodule(name)


def _running(codec: Codec, others: Mapping[nn.Module, nn.Module] | None = None) -> Codec:
    """Return ``codec`` with the transforms that run by its settings, and with ``others`` in places of modules."""
    settings, new = codec.fmpq, dict(others or {})
    for name in (*settings.backend, *settings.tiles):
        module = as_it_runs(codec, name)
        if name in settings.tiles:
            module = Tiled(settings.tiles[name], module, settings.budget)
        new[codec.get_submodule(name)] = module
    if not new:
        return codec
    running = cast(Codec, with_replaced(codec, new))
    running.fmpq = CodecSettings(settings.exact)  # its modules are already those that run
    return running


def _coding(codec: Codec) -> Codec:
    """Return the running ``codec``, with checked coders in its entropy models, and with its chooser if there is one."""
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
    """Return a twin of ``module`` whose class inherits from ``kind`` and from the class of ``module``."""
    cls = type(module)
    return shallow_copy(module, subclass(cls, kind, cls), **attributes)


def _empty(kind: type[Codec], cls: type[nn.Module]) -> nn.Module:
    return object.__new__(subclass(cls, kind, cls))
