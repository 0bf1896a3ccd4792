"""Let a codec code images of any size within a given memory, or say how much it needs before it starts."""

import copy
import warnings
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fmpq_fx.coding.codec import Codec, with_settings
from fmpq_fx.coding.tiles import Size, Transform
from fmpq_fx.errors import FmpqError
from fmpq_fx.exact import ExactLayer
from fmpq_fx.memory import bytes_of, spelled
from fmpq_fx.passes.tracing.examples import CHANNELS

LATENT_BYTES = 130
"""Bytes of entropy coding for each latent: tensors, the parameters of its CDF, lists of the coder (measured)."""

_SIDE = 64  # pixels; side of the image with which the transforms are found
_SURELY = 8192  # bytes per pixel that suffice; no model of CompressAI's zoo takes a fifth of it


def within(codec: Codec, size: Size, memory: int | str | None, *, images: int) -> Codec:
    """Return ``codec``, or one that shares its weights and codes an image of ``size`` within ``memory``.

    If the whole image would take more, the transforms run in tiles: the module that takes the image and returns
    latents, and the module that returns the reconstruction. So do layers in exact arithmetic, with the same bits. All
    other parts, entropy coding above all, see the whole latents, so that the bitstream is the same.

    Args:
        codec: a codec in its final dtype and on its final device. It is not modified.
        size: height and width of the padded image.
        memory: the memory for coding besides the codec (:func:`fmpq_fx.memory.bytes_of`).
        images: the number of images of ``size`` that are in memory besides the transforms' tensors.

    Raises:
        FmpqError: it needs more than the ``memory`` given; the message says how much. With None it is a warning.
    """
    budget = bytes_of(memory, next(codec.parameters()).device)
    if size[0] * size[1] * _SURELY <= budget:
        return codec
    try:
        ends = _ends(codec, size)
    except FmpqError as error:
        _complain(codec, size, "an unknown amount of memory", budget, str(error), memory)
        return codec
    image, latents = (end.like for end in ends)
    fixed = images * image.nbytes + latents.numel() * LATENT_BYTES
    room = budget - fixed
    need = fixed + max(end.least(room) for end in ends)
    if need > budget:
        whole = [f"{e.name!r} runs as a whole: {e.transform.obstacle}" for e in ends if e.transform.obstacle]
        _complain(codec, size, f"about {spelled(need)} of memory", budget, "; ".join(whole), memory)
        room = max(room, budget // 8)  # this exceeds the budget, but smaller tiles would take forever
    transforms = {end.name: end.transform for end in ends} | _found(codec).exact
    tiles = {name: transform for name, transform in transforms.items() if not transform.obstacle}
    return with_settings(codec, tiles=tiles, budget=room)


def latents_of(codec: Codec, size: Size) -> int:
    """Return how many latents the analysis of ``codec`` makes of an image of ``size``.

    Raises:
        FmpqError: no module of it is the analysis.
    """
    return _ends(codec, size)[1].like.numel()


@dataclass(frozen=True)
class _End:
    """The transform at one end of a codec."""

    name: str
    transform: Transform
    like: Tensor  # its input, without data

    def least(self, budget: int) -> int:
        """Return the bytes that it takes as a whole, or in tiles if that exceeds ``budget``."""
        whole = self.transform.peak(self.like, (self.like.size(-2), self.like.size(-1)))
        if whole <= budget or self.transform.obstacle:
            return whole
        return self.transform.grid(self.like, budget).peak


def _ends(codec: Codec, size: Size) -> list[_End]:
    """Return the analysis and the synthesis of ``codec`` for images of ``size``.

    Raises:
        FmpqError: it has none.
    """
    ends = []
    for end in _found(codec).ends:
        sides = [-(-side * n // _SIDE) for side, n in zip(end.like.shape[2:], size, strict=True)]
        ends.append(replace(end, like=end.like.new_empty((*end.like.shape[:2], *sides))))
    return ends


@dataclass(frozen=True)
class _Found:
    """The modules of a codec that can run in tiles, while it has the ``state``."""

    state: tuple[object, ...]  # dtype, device and modules
    ends: tuple[_End, _End]  # for an image of _SIDE x _SIDE
    exact: dict[str, Transform]  # layers in exact arithmetic


_FOUND: "WeakKeyDictionary[Codec, _Found]" = WeakKeyDictionary()


def _found(codec: Codec) -> _Found:
    """Return the modules of ``codec`` that can run in tiles; they are found once, and again after its modules change.

    The ends are found not by name, but by their inputs and outputs for a small image: the analysis takes an image and
    returns fewer values, the synthesis the other way round.

    Raises:
        FmpqError: it has no such ends.
    """
    parameter = next(codec.parameters())
    state = (parameter.dtype, parameter.device, *list(codec.modules())[1:])
    known = _FOUND.get(codec)
    if known is None or known.state != state:
        ends = tuple(
            _End(name, Transform(codec.get_submodule(name)), x.to("meta")) for name, x in _shown(codec)
        )
        exact = {name: Transform(m) for name, m in codec.named_modules() if isinstance(m, ExactLayer)}
        _FOUND[codec] = known = _Found(state, (ends[0], ends[1]), exact)
    return known


def _shown(codec: Codec) -> list[tuple[str, Tensor]]:
    """Return the names of the analysis and the synthesis, and the input of each when a small image is coded."""
    parameter, failure = next(codec.parameters()), None
    for channels in CHANNELS:
        image = torch.zeros(1, channels, _SIDE, _SIDE, device=parameter.device, dtype=parameter.dtype)
        try:
            return _shown_by(codec, image)
        except FmpqError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _shown_by(codec: Codec, image: Tensor) -> list[tuple[str, Tensor]]:
    shown = _twin(with_settings(codec, backend={})).eval()
    found: dict[bool, tuple[str, Tensor]] = {}  # False: analysis, True: synthesis; the outermost modules

    def note(name: str, args: tuple[object, ...], out: object) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            for synthesis, (end, other) in enumerate(((args[0], out), (out, args[0]))):
                if end.shape == image.shape and other.ndim == 4 and other.numel() < end.numel():
                    found[bool(synthesis)] = name, args[0]

    for name, module in shown.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: note(name, args, out))
    try:
        with torch.no_grad():
            shown(image)
    except Exception as error:  # a user's model may do anything
        raise FmpqError(f"it does not run on {_SIDE} x {_SIDE} pixels: {error}") from error
    if len(found) < 2:
        raise FmpqError(
            "it has no module that takes an image and returns latents, or none that returns the reconstruction; make "
            "its analysis and its synthesis modules (nn.Sequential, say)"
        )
    return [found[False], found[True]]


def _twin(codec: Codec) -> Codec:
    """Return a copy of ``codec`` whose parameters and buffers are the same tensors."""
    tensors = [*codec.parameters(), *codec.buffers()]
    return copy.deepcopy(codec, {id(tensor): tensor for tensor in tensors})


def _complain(codec: Codec, size: Size, need: str, budget: int, why: str, memory: int | str | None) -> None:
    """Raise an error that says how much memory is needed, or only warn if no memory was given."""
    text = (
        f"to code {size[1]} x {size[0]} pixels, this {type(codec).__name__} needs {need}, and may take "
        f"{spelled(budget)}{f' ({why})' if why else ''}"
    )
    if memory is not None:
        raise FmpqError(f"{text}; give it more with the option memory, or a smaller image")
    warnings.warn(f"{text}; the option memory says how much it may take", stacklevel=4)
