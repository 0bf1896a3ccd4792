"""Let a codec code images of any size within a given memory, or say what it needs before it starts."""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fmpq_fx.coding.codec import Codec, with_settings
from fmpq_fx.coding.tiles import Size, Transform
from fmpq_fx.errors import FmpqError
from fmpq_fx.exact import ExactLayer
from fmpq_fx.memory import bytes_of, spelled

LATENT_BYTES = 100
"""What entropy coding takes for each latent: tensors, the parameters of its CDF, lists of the coder (measured)."""

_SIDE = 64  # of the image that shows which modules are the transforms
_SURELY = 8192  # bytes per pixel; no model of CompressAI's zoo takes a fifth of it


def within(codec: Codec, size: Size, memory: int | str | None, *, images: int) -> Codec:
    """Return ``codec``, or one that shares its weights and codes an image of ``size`` within ``memory``.

    Where the whole image would take more, the transforms run in tiles: the module that takes the image and returns
    latents, and the one that returns the reconstruction. So do layers in exact arithmetic, with the same bits. All
    else, entropy coding above all, sees the whole latents: the bitstream is as ever.

    Args:
        codec: in the dtype and on the device on which it will run. It is not modified.
        size: height and width of the image as it is coded, padded.
        memory: what coding may take beside the codec (:func:`fmpq_fx.memory.bytes_of`).
        images: of ``size``, that are in memory beside what the transforms take.

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
        room = max(room, budget // 8)  # more than there is, but no tiles so small that they take forever
    transforms = {end.name: end.transform for end in ends}
    transforms |= {name: Transform(m) for name, m in codec.named_modules() if isinstance(m, ExactLayer)}
    tiles = {name: transform for name, transform in transforms.items() if not transform.obstacle}
    return with_settings(codec, tiles=tiles, budget=room)


def latents_of(codec: Codec, size: Size) -> int:
    """Return how many latents the analysis of ``codec`` makes of an image of ``size``.

    Raises:
        FmpqError: it has no module that is its analysis.
    """
    return _ends(codec, size)[1].like.numel()


@dataclass(frozen=True)
class _End:
    """The transform at one end of a codec."""

    name: str
    transform: Transform
    like: Tensor  # its input, without data

    def least(self, budget: int) -> int:
        """Return the bytes that it takes, as a whole or in tiles, within ``budget`` where that is possible."""
        whole = self.transform.peak(self.like, (self.like.size(-2), self.like.size(-1)))
        if whole <= budget or self.transform.obstacle:
            return whole
        return self.transform.grid(self.like, budget).peak


def _ends(codec: Codec, size: Size) -> list[_End]:
    """Return the analysis and the synthesis of ``codec`` for images of ``size``.

    They are found by what goes in and comes out when a small image is coded, not by their names: an image and
    less than that, and the other way round.

    Raises:
        FmpqError: there are none.
    """
    parameter = next(codec.parameters())
    image = torch.zeros(1, 3, _SIDE, _SIDE, device=parameter.device, dtype=parameter.dtype)
    shown = _twin(with_settings(codec, backend={})).eval()
    found: dict[bool, tuple[str, Tensor]] = {}  # by whether it is the synthesis; the outermost modules

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
    ends = []
    for name, like in (found[False], found[True]):
        sides = [-(-side * n // _SIDE) for side, n in zip(like.shape[2:], size, strict=True)]
        ends.append(
            _End(
                name,
                Transform(codec.get_submodule(name)),
                like.new_empty((*like.shape[:2], *sides), device="meta"),
            )
        )
    return ends


def _twin(codec: Codec) -> Codec:
    """Return a copy of ``codec`` whose parameters and buffers are the same tensors."""
    tensors = [*codec.parameters(), *codec.buffers()]
    return copy.deepcopy(codec, {id(tensor): tensor for tensor in tensors})


def _complain(codec: Codec, size: Size, need: str, budget: int, why: str, memory: int | str | None) -> None:
    """Raise an error that says what is needed, or only warn where no memory was given."""
    text = (
        f"to code {size[1]} x {size[0]} pixels, this {type(codec).__name__} needs {need}, and may take "
        f"{spelled(budget)}{f' ({why})' if why else ''}"
    )
    if memory is not None:
        raise FmpqError(f"{text}; give it more with the option memory, or a smaller image")
    warnings.warn(f"{text}; the option memory says how much it may take", stacklevel=4)
