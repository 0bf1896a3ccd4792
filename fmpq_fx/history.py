"""The history of training: its settings, its losses, and the validations along the way."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from tabulate import tabulate

from fmpq_fx.rd import MSE, psnr
from fmpq_fx.storage.files import JsonFile

LOSSES = ("rd", "mse")


def _option(default: Any, text: str) -> Any:
    """Return a field with its default and a description, which the command line prints as well."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """The options of training: everything that decides the result besides the model and the images.

    Raises:
        ValueError: one is out of its range.
    """

    lmbda: float = field(metadata={"help": "weight of the distortion"})
    _: KW_ONLY
    steps: int = _option(300, "number of steps")
    distortion: str = _option(
        MSE.name,
        "distortion that the model was trained for: mse, ms-ssim, or package.module:function; default: by the plan",
    )
    loss: str = _option("rd", "rd is rate + lmbda * distortion; mse is the distortion alone, if that is mse")
    size_weight: float = _option(
        0.0,
        "weight of the coded CR, which is added to the RD loss: with 1, the RD loss may rise by 0.01 for each 0.01 by "
        "which CR falls; 0 leaves the size alone",
    )
    batch_size: int = _option(4, "random crops in a step, of all processes together")
    crop: int = _option(192, "side of a crop in pixels, a multiple of 64")
    lr: float = _option(3e-5, "learning rate of weights, biases and entropy models")
    quantizer_lr: float = _option(3e-4, "learning rate of the logarithms of the quantizers' steps")
    aux_lr: float = _option(1e-3, "learning rate of the entropy bottlenecks' quantiles")
    constant: float = _option(
        0.0, "part of the steps before the learning rates fall to 0, along half a cosine"
    )
    max_norm: float = _option(
        1.0, "largest norm of the gradient, which is scaled down to it; inf leaves it as it is"
    )
    bfloat16: bool = _option(
        False, "compute the transforms in bfloat16; entropy models and loss stay float32"
    )
    validate_every: int = _option(50, "steps between validations")
    seed: int = _option(0, "seed of crops and noise")

    def __post_init__(self) -> None:
        positive = (
            "lmbda",
            "steps",
            "batch_size",
            "lr",
            "quantizer_lr",
            "aux_lr",
            "max_norm",
            "validate_every",
        )
        for name in positive:
            value = getattr(self, name)
            if not (value > 0 and (math.isfinite(value) or name == "max_norm")):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.loss == "mse" and self.distortion != MSE.name:
            raise ValueError(
                f"loss='mse' lowers MSE alone, and the distortion is {self.distortion}; pass loss='rd'"
            )
        if not 0 <= self.size_weight < math.inf:
            raise ValueError(f"size_weight must be 0 or positive, and finite, got {self.size_weight}")
        if self.size_weight and self.loss != "rd":
            raise ValueError(
                f"size_weight {self.size_weight:g} weighs the size against the RD loss, and loss is {self.loss!r}; "
                "pass loss='rd'"
            )
        if self.crop < 64 or self.crop % 64:
            raise ValueError(f"crop must be a positive multiple of 64, got {self.crop}")
        if not 0 <= self.constant <= 1:
            raise ValueError(f"constant must lie in [0, 1], got {self.constant}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def schedule(self, step: int) -> float:
        """Return the factor of the learning rates at ``step``: 1, then half a cosine down to 0."""
        start = self.constant * self.steps
        if step <= start:
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (step - start) / (self.steps - start))


@dataclass(frozen=True)
class Validation:
    """How good the model was on the held-out images, in evaluation mode, after ``step`` steps."""

    step: int
    bpp: float  # bits per pixel, from the likelihoods
    mse: float  # mean squared error of images in [0, 1], not rounded to 8 bits
    rd_loss: float  # bpp + lmbda * distortion
    cr: float | None = None  # CR of the quantized weights as the model file codes them; None: not in the loss

    @property
    def psnr(self) -> float:
        """PSNR of all images together, in dB."""
        return psnr(self.mse)

    def loss(self, settings: Settings) -> float:
        """Return the loss that training with ``settings`` lowers."""
        if settings.loss == "mse":
            return self.mse
        return self.rd_loss if self.cr is None else self.rd_loss + settings.size_weight * self.cr


def best_of(validation: Sequence[Validation], settings: Settings) -> Validation:
    """Return the earliest validation with the lowest loss; NaN counts as higher than any number."""
    return min(validation, key=lambda v: (math.isnan(v.loss(settings)), v.loss(settings)))


@dataclass(frozen=True)
class History(JsonFile):
    """The history of a training, which left the model in its state of :attr:`best`."""

    settings: Settings
    trained_on: str  # the images, in words
    validated_on: str  # the held-out images, in words
    losses: tuple[float, ...]  # the loss of every step
    validation: tuple[Validation, ...]  # the first is the model as it came, after 0 steps
    remarks: str = ""  # things that the user should know about the training

    @property
    def best(self) -> Validation:
        """The validation of the state that was kept."""
        return best_of(self.validation, self.settings)

    @property
    def gain(self) -> float:
        """Fraction by which training lowered the first validation's RD loss; negative if it rose."""
        return 1 - self.best.rd_loss / self.validation[0].rd_loss

    def __str__(self) -> str:
        rows = [
            (
                v.step,
                f"{v.bpp:.4f}",
                f"{v.psnr:.3f}",
                f"{v.rd_loss:.4f}",
                *([] if v.cr is None else [f"{v.cr:.4f}"]),
                "kept" if v is self.best else "",
            )
            for v in self.validation
        ]
        size = [] if self.best.cr is None else ["coded CR"]
        headers = ("step", "bpp", "PSNR (dB)", "RD loss", *size, "")
        aligned = ("right",) * (len(headers) - 1) + ("left",)
        table = tabulate(rows, headers, disable_numparse=True, colalign=aligned)
        images = f"trained on {self.trained_on}, validated on {self.validated_on}"
        metric = "" if self.settings.distortion == MSE.name else f", distortion: {self.settings.distortion}"
        return f"{table}\n\n{images}{metric}"

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> "History":
        fields["settings"] = Settings(**fields["settings"])
        fields["validation"] = tuple(Validation(**v) for v in fields["validation"])
        fields["losses"] = tuple(fields["losses"])
        if not fields["validation"]:
            raise ValueError("it has no validation")
        return cls(**fields)
