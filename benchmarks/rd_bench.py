"""Measure variants of a model at one lambda: quantized or not, fine-tuned or not, on real bitstreams."""

import argparse
import copy
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from rd_points import Point, Results, Variant
from torch import fx, nn

from fmpq_fx import (
    evaluate,
    file_report,
    finetune,
    plan_of,
    prepare,
    samples,
    save,
)
from fmpq_fx.history import Settings
from fmpq_fx.images.distortions import find_distortion
from fmpq_fx.images.reading import fingerprint, sources
from fmpq_fx.models.zoo import load_model
from fmpq_fx.storage.fingerprint import digest
from fmpq_fx.training.loop import train

LMBDAS = {
    "mse": (0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483, 0.0932, 0.1800),
    "ms-ssim": (2.40, 4.58, 8.73, 16.64, 31.73, 60.50, 115.37, 220.00),
}
"""What CompressAI's pretrained weights were trained with, by quality from 1."""


class Bench:
    """The measurements of one model at one lambda.

    Args:
        args: the command line.
        lmbda: what the model was trained with.
        checkpoint: its weights; None is the sample model, or CompressAI's weights of ``quality``.
        quality: of CompressAI's pretrained weights.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        lmbda: float,
        checkpoint: Path | None = None,
        quality: int | None = None,
    ):
        self.args, self.lmbda, self.checkpoint, self.quality = args, lmbda, checkpoint, quality
        self.series = args.model if args.metric == "mse" else f"{args.model}-{args.metric}"
        self.name = f"{self.series}-{lmbda:.4f}"
        about = {
            "model": f"{args.model}, lambda {lmbda}, weights {digest(self.model().state_dict())[:12]}",
            "calibration": fingerprint(sources(args.calibration)),
            "training": f"{fingerprint(sources(args.train))}; {args.batch_size} crops of {args.crop} x {args.crop}",
            "images": fingerprint(sources(args.images)),
        }
        self.results = Results(args.out / f"bd_rate-{self.name}.json", about)
        self.key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]

    def model(self) -> nn.Module:
        """Return the float model."""
        if self.quality is not None:
            return load_model(self.args.model, quality=self.quality, metric=self.args.metric)
        if self.checkpoint is not None:
            return load_model(self.args.model, checkpoint=self.checkpoint)
        sample: nn.Module = samples.model(self.lmbda)
        return sample

    def measure(self, variants: Iterable[Variant]) -> list[Point]:
        """Return the points of ``variants``, which have one planner and size; missing points are measured."""
        variants = list(variants)
        missing = [variant for variant in variants if variant not in self.results.points]
        if missing and missing[0].planner == "float":
            self._measure_float(missing)
        elif missing:
            self._measure_quantized(missing)
        return [self.results.points[variant] for variant in variants]

    def _measure_float(self, variants: list[Variant]) -> None:
        for variant in variants:
            model = self.model()
            if variant.steps:
                settings = Settings(
                    self.lmbda,
                    steps=variant.steps,
                    loss=variant.loss,
                    distortion=self.args.metric,
                    batch_size=self.args.batch_size,
                    crop=self.args.crop,
                )
                train(
                    model,
                    self.args.train,
                    settings,
                    distortion=find_distortion(self.args.metric),
                    checkpoint=self._training(variant),
                )
                model.update(force=True)  # type: ignore[operator]
            self._evaluate(variant, model, None)

    def _measure_quantized(self, variants: list[Variant]) -> None:
        prepared = {
            bits: prepare(
                self.model(),
                variants[0].target_cr,
                calibration=self.args.calibration,
                lmbda=self.lmbda,
                distortion=self.args.metric,
                checkpoint=self.args.cache / f"{self.name}-{self.key}-sensitivity.json",
                planner=variants[0].planner,
                size=variants[0].size,
                activation_bits=bits,
                activation_budget=variants[0].activation_budget,
            )
            for bits in {variant.activation_bits for variant in variants}
        }
        for variant in variants:
            gm = copy.deepcopy(prepared[variant.activation_bits])
            if variant.steps:
                finetune(
                    gm,
                    self.args.train,
                    steps=variant.steps,
                    loss=variant.loss,
                    crop=self.args.crop,
                    batch_size=self.args.batch_size,
                    checkpoint=self._training(variant),
                )
            self._evaluate(variant, gm, gm)

    def _training(self, variant: Variant) -> Path:
        return (
            Path(self.args.cache)
            / f"{self.name}-{self.key}-{'-'.join(map(str, dataclasses.astuple(variant)))}.pt"
        )

    def _evaluate(self, variant: Variant, model: nn.Module, quantized: fx.GraphModule | None) -> None:
        results = evaluate(model, self.args.images, robust=None)  # as published figures are
        bits, coded_cr, activation_bits = 32.0, None, 32.0
        if quantized is not None:
            plan, coded_cr = plan_of(quantized), _coded_cr(quantized)
            bits, activation_bits = plan.average_bits, plan.average_activation_bits
        self.results.add(
            Point.of(variant, self.lmbda, bits, coded_cr, activation_bits, results, self.args.metric)
        )
        self._training(variant).unlink(missing_ok=True)


def _coded_cr(gm: fx.GraphModule) -> float:
    """Return the CR that the model file of ``gm`` really has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fmpq"
        save(gm, path)
        return file_report(path).coded_cr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :class:`Bench` needs."""
    add = parser.add_argument
    add("--model", default="bmshj2018-hyperprior", help="a name of CompressAI's zoo")
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="LMBDA=FILE",
        help="trained weights per lambda; default: the sample models of the package",
    )
    add(
        "--qualities",
        type=int,
        choices=range(1, 9),
        nargs="+",
        metavar="1 … 8",
        help="qualities of CompressAI's pretrained weights, which it downloads, instead of --checkpoint",
    )
    add("--metric", choices=list(LMBDAS), default="mse", help="distortion that the weights were trained for")
    add("--lmbda", type=float, nargs="+", help="measure these lambdas alone; default: all there are")
    add("--calibration", required=True, help="image folder to measure sensitivity on")
    add("--train", required=True, help="image folder to fine-tune on")
    add("--images", required=True, help="image folder to evaluate on")
    add("--steps", type=int, default=300, help="steps of fine-tuning")
    add("--crop", type=int, default=192, help="side of the training crops")
    add("--batch-size", type=int, default=4)
    add("--threads", type=int, help="threads of torch; default: its own choice")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results and pictures")
    add("--cache", type=Path, default=Path("out/bd_rate"), help="folder for checkpoints")


def benches(args: argparse.Namespace) -> list[Bench]:
    """Return a bench for each lambda of the command line, and set up folders and threads."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.qualities and (args.checkpoint or args.lmbda):
        raise SystemExit("--qualities name weights and lambdas; leave --checkpoint and --lmbda out")
    if args.qualities:
        return [Bench(args, LMBDAS[args.metric][quality - 1], quality=quality) for quality in args.qualities]
    files = {float(lmbda): Path(file) for lmbda, _, file in (text.partition("=") for text in args.checkpoint)}
    lmbdas = args.lmbda or list(files) or list(samples.LMBDAS)
    return [Bench(args, lmbda, files.get(lmbda)) for lmbda in lmbdas]
