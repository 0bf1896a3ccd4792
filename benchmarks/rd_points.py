"""Rate-distortion points of quantized models, measured on real bitstreams and kept in a JSON file as they come."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fmpq_fx import Evaluation
from fmpq_fx.coding.evaluation import ImageResult
from fmpq_fx.storage.files import write_text


@dataclass(frozen=True)
class Variant:
    """A way to quantize and train a model."""

    planner: str = "float"
    target_cr: float = 1.0
    activation_bits: int | str | None = None  # None is float
    steps: int = 0  # steps of fine-tuning
    loss: str = "rd"  # the loss that fine-tuning lowers
    size: str = "nominal"  # the size that target_cr counts, or "coded"
    activation_budget: float = 0.1  # fraction of products that inputs of 16 bits may add, if inputs are mixed


@dataclass(frozen=True)
class Point:
    """The results of a variant, means over the images."""

    variant: Variant
    lmbda: float  # the lambda of training, fine-tuning and the RD loss
    weight_bits: float  # average
    bpp: float  # real bits on the wire per pixel
    estimated_bpp: float  # from likelihoods
    psnr: float  # dB, of 8-bit images
    ms_ssim: float
    rd_loss: float  # mean of real bpp + lmbda * distortion of 8-bit images
    deviation: int  # largest difference of a decoded image from the forward pass's, 8-bit levels
    coded_cr: float | None = None  # coded weight bytes / float32 bytes, as evaluated; None: not measured
    activation_bits: float = 32  # average; of older points it is the variant's
    metric: str = "mse"  # of the RD loss: of training, fine-tuning and ``rd_loss``

    @property
    def measure(self) -> str:
        """The name of the measure in :attr:`quality`."""
        return "PSNR" if self.metric == "mse" else "MS-SSIM"

    @property
    def quality(self) -> float:
        """The quality for BD-rate, in dB: PSNR, or -10 log10(1 - MS-SSIM)."""
        return self.psnr if self.metric == "mse" else -10 * math.log10(1 - self.ms_ssim)

    @classmethod
    def of(
        cls,
        variant: Variant,
        lmbda: float,
        weight_bits: float,
        coded_cr: float | None,
        activation_bits: float,
        evaluation: Evaluation,
        metric: str = "mse",
    ) -> "Point":
        """Return the means of ``evaluation``."""
        losses = [i.bpp + lmbda * _distortion(i, metric) for i in evaluation.images]
        return cls(
            variant,
            lmbda,
            weight_bits,
            evaluation.bpp,
            evaluation.estimated_bpp,
            evaluation.psnr,
            evaluation.ms_ssim,
            math.fsum(losses) / len(losses),
            evaluation.deviation,
            coded_cr,
            activation_bits,
            metric,
        )


def _distortion(image: ImageResult, metric: str) -> float:
    if metric == "mse":
        return float(255**2 * 10 ** (-image.psnr / 10))
    if image.ms_ssim is None:
        raise SystemExit(f"{image.name} is too small for MS-SSIM; take larger --images, or --metric mse")
    return 1 - image.ms_ssim


class Results:
    """The points of one model at one lambda, in a file that is complete after every :meth:`add`.

    Args:
        path: the file; what is there is taken over.
        about: what the points depend on. Points of something else are refused.
    """

    def __init__(self, path: Path, about: dict[str, str]):
        self.path, self.about = path, about
        self.points: dict[Variant, Point] = {}
        self._read()

    def _read(self) -> None:
        if self.path.exists():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["about"] != self.about:
                raise SystemExit(
                    f"{self.path} holds results of {content['about']}, not of {self.about}; move it away"
                )
            self.points |= {point.variant: point for point in map(_point, content["points"])}

    def add(self, point: Point) -> None:
        """Keep ``point`` and write the file, with what another benchmark has added meanwhile."""
        self._read()
        self.points[point.variant] = point
        content = {"about": self.about, "points": [asdict(p) for p in self.points.values()]}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def _point(fields: dict[str, object]) -> Point:
    variant = Variant(**fields["variant"])  # type: ignore[arg-type]
    return Point(**{"activation_bits": variant.activation_bits or 32, **fields, "variant": variant})  # type: ignore[arg-type]


def curve(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    """Return the bits per pixel and the quality of ``points``, in dB, by ascending rate."""
    ordered = sorted(points, key=lambda p: p.bpp)
    return [p.bpp for p in ordered], [p.quality for p in ordered]
