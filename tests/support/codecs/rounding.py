"""Rounding with a gradient: by functions with a backward of their own, and by noise in training."""

from typing import Any

import torch
from torch import Tensor

from support.codecs.small import Small


class RoundStraightThrough(torch.autograd.Function):
    """Rounds; gradients pass as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class LowerBound(torch.autograd.Function):
    """Bounds values from below; gradients that would raise them pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


def lower_bounded(x: Any, bound: float) -> Tensor:
    bounded: Tensor = LowerBound.apply(x, bound)
    return bounded


class StraightThrough(Small):
    """Rounds with a function of its own, in training as well."""

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales, means = self.h_s(z_hat).chunk(2, 1)
        _, likelihoods = self.gaussian_conditional(y, scales, means=means)
        return RoundStraightThrough.apply(y - means) + means, lower_bounded(likelihoods, 1e-8)


class NoiseInTraining(Small):
    """Decides on self.training in code of its own: noise there, rounding in evaluation."""

    def coded(self, y: Tensor, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        _, likelihoods = super().coded(y, z_hat)
        if self.training:
            return y + torch.empty_like(y).uniform_(-0.5, 0.5), likelihoods
        return torch.round(y), likelihoods
