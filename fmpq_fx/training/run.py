"""One run of training: the model, its optimizers, the losses and validations so far, and the checkpoint of all."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from fmpq_fx.errors import FmpqError
from fmpq_fx.history import Settings, Validation, best_of
from fmpq_fx.models.checkpoint import read_tensors
from fmpq_fx.passes.measure.coded_sizes import coded_cr
from fmpq_fx.quant import ActivationFakeQuant, WeightFakeQuant, quantized_layers
from fmpq_fx.ranks import ALONE, Ranks
from fmpq_fx.rd import MSE, PEAK, Distortion, RDSums, psnr, rate_and_distortion, rd_sums
from fmpq_fx.storage.files import replacing
from fmpq_fx.storage.fingerprint import digest
from fmpq_fx.training.bfloat16 import transforms_in_bfloat16
from fmpq_fx.training.weight_entropy import weight_cr

FORMAT = "fmpq_fx training, version 2"


class TrainingRun:
    """The state of training ``model``, which it changes.

    Weights and quantization parameters are separate parameter groups. The quantiles of entropy bottlenecks have a
    separate optimizer and loss, as CompressAI trains them.

    With several ranks, each has a copy of the model and takes its share of a step's images. Gradients and figures are
    means over all ranks, so that every rank takes the same steps and the same decisions.

    Args:
        model: the model to train.
        batches: images (B, C, H, W) each, to validate on.
        settings: the options of training.
        distortion: the distortion in the RD loss.
        ranks: the processes that train together, once each of them has called :meth:`join`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        settings: Settings,
        distortion: Distortion = MSE,
        ranks: Ranks = ALONE,
    ):
        self.model, self.batches, self.settings, self.ranks = model, batches, settings, ranks
        self.distortion = distortion
        self.bottlenecks = [m for m in model.modules() if isinstance(m, EntropyBottleneck)]
        groups = parameter_groups(model, settings)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.Adam(groups)
        self.scheduler = LambdaLR(self.optimizer, settings.schedule)
        quantiles = [m.quantiles for m in self.bottlenecks if m.quantiles.requires_grad]
        self.aux_optimizer = torch.optim.Adam(quantiles, settings.aux_lr) if quantiles else None
        self.losses: list[float] = []  # the losses of the steps done
        self.validation: list[Validation] = []
        self.diverged = False
        self.best = _copied(model.state_dict())
        self.start = digest(self.best)
        self.objective: nn.Module = _Objective(model, settings, distortion)

    def join(self) -> None:
        """Train together with the other ranks from now on.

        Raises:
            FmpqError: the ranks have different weights.
        """
        self.ranks.require_same({"the model": f"{type(self.model).__name__}, weights {self.start[:12]}"})
        self.objective = self.ranks.replicate(self.objective)

    @property
    def due(self) -> bool:
        """Whether the model is to be validated after the step just done."""
        return len(self.losses) % self.settings.validate_every == 0 or len(self.losses) == self.settings.steps

    def step(self, x: Tensor) -> dict[str, str]:
        """Train on ``x``, this rank's images (B, C, H, W); return figures to show. May set :attr:`diverged`."""
        settings = self.settings
        self._seed(x.device)
        self.model.train()
        self.optimizer.zero_grad()
        parts = torch.stack(self.objective(x))
        parts.sum().backward()
        norm = clip_grad_norm_(self.parameters, settings.max_norm)
        bpp, weighted, *size = self.ranks.average(parts.detach()).tolist()
        self.losses.append(bpp + weighted + sum(size) if settings.loss == "rd" else weighted)
        if not (math.isfinite(self.losses[-1]) and math.isfinite(norm)):
            self.diverged = True
            return {}
        self.optimizer.step()
        self.scheduler.step()
        self._train_quantiles()
        mean = weighted / settings.lmbda
        quality = (
            {"PSNR": f"{psnr(mean / PEAK**2):.2f}"}
            if self.distortion == MSE
            else {"distortion": f"{mean:.4g}"}
        )
        cr = {"CR": f"{size[0] / settings.size_weight:.4f}"} if size else {}
        return {"loss": f"{self.losses[-1]:.3f}", "bpp": f"{bpp:.3f}", **quality, **cr}

    def _seed(self, device: torch.device) -> None:
        """Make the noise of this step a function of the seed, the step's number and the rank, on ``device`` only."""
        source = np.random.SeedSequence([self.settings.seed, len(self.losses), self.ranks.rank])
        (seed,) = source.generate_state(1).tolist()
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)

    def _train_quantiles(self) -> None:
        # Their loss depends only on parameters, so it is the same on every rank.
        if self.aux_optimizer is not None:
            self.aux_optimizer.zero_grad()
            torch.stack([m.loss() for m in self.bottlenecks]).sum().backward()
            self.aux_optimizer.step()

    @torch.no_grad()
    def validate(self) -> None:
        """Measure the present model, in evaluation mode and full precision, and keep it if it is the best."""
        self.model.eval()
        own: list[tuple[RDSums, RDSums]] = []  # sums with the distortion, and with MSE
        for x in self.ranks.share(self.batches):
            output = self.model(x)
            own.append((rd_sums(output, x, self.distortion), rd_sums(output, x, MSE)))
        sums, by_mse = (sum(all_of_one, RDSums()) for all_of_one in zip(*self.ranks.merge(own), strict=True))
        mse, rd = by_mse.distortion / PEAK**2, sums.rd(self.settings.lmbda)
        cr = coded_cr(self.model, self.ranks) if self.settings.size_weight else None
        result = Validation(len(self.losses), sums.rate, mse, rd, cr)
        self.validation.append(result)
        if best_of(self.validation, self.settings) is result:
            self.best = _copied(self.model.state_dict())

    @property
    def remarks(self) -> str:
        """The things that the user should know about the training, with a remedy; "" if there are none."""
        first, last = (v.loss(self.settings) for v in (self.validation[0], self.validation[-1]))
        name = "RD loss" if self.settings.loss == "rd" else "MSE"
        name += f" + {self.settings.size_weight:g} * CR" if self.settings.size_weight else ""
        remedy = "try a lower lr and quantizer_lr, a larger batch_size, or more bits per weight"
        if self.diverged:
            return (
                f"Training diverged at step {len(self.losses)}: loss or gradient were not finite. The best state "
                f"before that was kept; {remedy}."
            )
        if not last < first:
            return (
                f"The {name} on the validation images ended above where it began ({last:.6g} after {first:.6g}). The "
                f"best state was kept; {remedy}, or images that resemble those to validate on."
            )
        return ""

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Write everything that :meth:`load` needs to ``path``; if that fails, the present file stays whole."""
        with replacing(path) as file:
            torch.save({"format": FORMAT, "about": dict(about), **self._state()}, file)

    def _state(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "aux_optimizer": None if self.aux_optimizer is None else self.aux_optimizer.state_dict(),
            "losses": self.losses,
            "validation": [vars(v) for v in self.validation],
        }

    def load(self, path: Path, about: Mapping[str, str]) -> None:
        """Restore the state that :meth:`save` wrote to ``path``.

        Raises:
            FmpqError: the file is no checkpoint, of another run than ``about`` describes, or of other weights: the
                model must have the weights of before the first step, or those that the run left it with.
        """
        state = _read(path)
        remedy = "remove the file to begin anew, or name another"
        for name, value in about.items():
            if state["about"].get(name) != value:
                raise FmpqError(
                    f"the checkpoint {path} is of another run: {name} was {state['about'].get(name)!r} there and is "
                    f"{value!r} now; {remedy}"
                )
        if self.start not in (state["start"], digest(state["best"])):
            raise FmpqError(f"the checkpoint {path} is of a model with other weights; {remedy}")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.aux_optimizer is not None:
                self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        except ValueError as error:  # parameters were frozen or unfrozen meanwhile
            raise FmpqError(
                f"the checkpoint {path} is of another run: other parameters were trained; {remedy}"
            ) from error
        self.scheduler.load_state_dict(state["scheduler"])
        self.model.load_state_dict(state["model"])
        self.start, self.best = state["start"], state["best"]
        self.losses = state["losses"]
        self.validation = [Validation(**v) for v in state["validation"]]
        self.ranks.require_same(
            {"the checkpoint": f"of step {len(self.losses)}, weights {digest(state['model'])[:12]}"}
        )


class _Objective(nn.Module):
    """The parts of the loss of ``model`` on images: rate, distortion, and the size if that is trained.

    A rate that is not trained is detached.
    """

    def __init__(self, model: nn.Module, settings: Settings, distortion: Distortion):
        super().__init__()
        self.model, self.settings, self.distortion = model, settings, distortion

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with transforms_in_bfloat16(self.model, x.device) if self.settings.bfloat16 else nullcontext():
            output = self.model(x)
        rate, distortion = rate_and_distortion(output, x, self.settings.lmbda, self.distortion)
        rate = rate if self.settings.loss == "rd" else rate.detach()
        if not self.settings.size_weight:
            return rate, distortion
        return rate, distortion, self.settings.size_weight * weight_cr(quantized_layers(self.model).values())


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return the parameters of ``model``, without the quantiles of entropy bottlenecks, in groups by learning rate.

    A zero point is in units of integers, a step is a logarithm. So zero points get the steps' learning rate times
    their largest integer, and both move by the same fraction of the range.

    Raises:
        FmpqError: all parameters are frozen.
    """
    rates: dict[Tensor, float] = dict.fromkeys(model.parameters(), settings.lr)
    for module in model.modules():
        if isinstance(module, EntropyBottleneck):
            rates.pop(module.quantiles, None)
        if isinstance(module, WeightFakeQuant | ActivationFakeQuant):
            rates[module.log_scale] = settings.quantizer_lr
        if isinstance(module, WeightFakeQuant) and module.log_spread is not None:
            rates[module.log_spread] = settings.quantizer_lr
        if isinstance(module, ActivationFakeQuant):
            rates[module.zero_point] = settings.quantizer_lr * module.high
    if not any(p.requires_grad for p in rates):
        raise FmpqError("all parameters are frozen; let some be trained: gm.requires_grad_()")
    return [
        {"params": [p for p, rate in rates.items() if rate == lr and p.requires_grad], "lr": lr}
        for lr in sorted(set(rates.values()))
    ]


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        state: Any = read_tensors(path)
    except FmpqError as error:
        raise FmpqError(
            f"{path} is no checkpoint of training; remove it, or name another ({error})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FmpqError(f"{path} is no checkpoint of this version's training; remove it, or name another")
    return state
