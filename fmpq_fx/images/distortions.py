"""The distortions that a model may have been trained for, with lambda in CompressAI's convention for each."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmpq_fx.errors import FmpqError
from fmpq_fx.images.ms_ssim import LEAST_SIDE, ms_ssim
from fmpq_fx.rd import MSE, Distortion

Given = str | Callable[[Tensor, Tensor], Tensor]
"""A name of :data:`DISTORTIONS`, or a function of decoded and original images, (B, C, H, W) in [0, 1].

The function returns a differentiable scalar, which lambda weighs: a mean over the images, lower for better ones."""


def _dissimilarity(x_hat: Tensor, x: Tensor) -> Tensor:
    if min(x.shape[-2:]) < LEAST_SIDE:
        raise FmpqError(
            f"MS-SSIM compares images of at least {LEAST_SIDE} x {LEAST_SIDE}, got {x.size(-2)} x {x.size(-1)}; pass "
            "larger images or crops, or distortion='mse'"
        )
    return (1 - ms_ssim(x_hat.to(x), x, 1.0)).sum()


MS_SSIM = Distortion("ms-ssim", _dissimilarity, len)
"""1 - MS-SSIM, the mean over images."""

DISTORTIONS = {distortion.name: distortion for distortion in (MSE, MS_SSIM)}


def find_distortion(given: Given | None, recorded: str = MSE.name) -> Distortion:
    """Return the distortion ``given``; for None, the one whose name was ``recorded`` with a plan or a table.

    Raises:
        ValueError: there is no such distortion, or the recorded one is a function, which must be given again.
        TypeError: ``given`` is neither a name nor a function.
    """
    if given is None and recorded not in DISTORTIONS:
        raise ValueError(
            f"the distortion was {recorded}, a function of your own; pass it again, distortion=..."
        )
    wanted = recorded if given is None else given
    if isinstance(wanted, str):
        if wanted not in DISTORTIONS:
            raise ValueError(
                f"distortion is {wanted!r}; pass {', '.join(map(repr, DISTORTIONS))}, or a function"
            )
        return DISTORTIONS[wanted]
    if not callable(wanted):
        raise TypeError(f"distortion is a {type(wanted).__name__}; pass 'mse', 'ms-ssim' or a function")
    return _of_function(wanted)


def _of_function(mean: Callable[[Tensor, Tensor], Tensor]) -> Distortion:
    where, name = (getattr(mean, part, type(mean).__name__) for part in ("__module__", "__qualname__"))

    def total(x_hat: Tensor, x: Tensor) -> Tensor:
        try:
            value = mean(x_hat, x)
        except Exception as error:  # the user's code may raise anything
            raise FmpqError(
                f"the distortion {name} failed on decoded and original images, two tensors {tuple(x.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the distortion {name} returned {what}; expected a tensor with one number")
        return value.reshape(()).to(torch.float64) * len(x)

    return Distortion(f"{where}:{name}", total, len)
