"""BD-rate and BD-PSNR of quantized models against float32, on real bitstreams, before and after fine-tuning.

For every lambda: the float model, the float model fine-tuned for the same steps, and every planner at every
size, weights only (A32) and with 8-bit activations (A8). Every result is kept as soon as it is there: the same
command goes on where it was stopped, and several processes may share the work, each with lambdas of its own.

    python benchmarks/bd_rate.py --calibration bsds500/val --train bsds500/train --images kodak
"""

import argparse
import copy
import dataclasses
from pathlib import Path

import torch
from rd_points import Point, Results, Variant
from rd_table import plot_curves, print_losses, print_table
from torch import fx, nn
from tqdm import tqdm

from fmpq_fx import Sensitivity, analyze, evaluate, finetune, plan_of, prepare, rewrite, samples
from fmpq_fx.history import Settings
from fmpq_fx.passes.memory import freed_memory_kept
from fmpq_fx.training import train
from fmpq_fx.zoo import load_model


class Bench:
    """The measurements of one model at one lambda.

    Args:
        args: the command line.
        lmbda: what the model was trained with.
        checkpoint: its weights; None is the sample model.
    """

    def __init__(self, args: argparse.Namespace, lmbda: float, checkpoint: Path | None):
        self.args, self.lmbda, self.checkpoint = args, lmbda, checkpoint
        self.name = f"{args.model}-{lmbda:.4f}"
        about = {
            "model": f"{args.model}, lambda {lmbda}",
            "calibration": Path(args.calibration).name,
            "training": f"{Path(args.train).name}, {args.batch_size} crops of {args.crop} x {args.crop}",
            "images": Path(args.images).name,
        }
        self.results = Results(args.out / f"bd_rate-{self.name}.json", about)

    def model(self) -> nn.Module:
        """Return the float model."""
        if self.checkpoint is None:
            return samples.model(self.lmbda)
        return load_model(self.args.model, checkpoint=self.checkpoint)

    def sensitivity(self) -> Sensitivity:
        """Return the model's table, measured once."""
        path = self.args.cache / f"{self.name}-sensitivity.json"
        if not path.exists():
            table = analyze(self.model(), calibration=self.args.calibration, lmbda=self.lmbda)
            table.save(path)
        return Sensitivity.load(path)

    def missing(self, *variants: Variant) -> list[Variant]:
        """Return those of ``variants`` that were not measured yet."""
        return [variant for variant in variants if variant not in self.results.points]

    def float_points(self) -> None:
        """Measure the float model as it is and fine-tuned."""
        tuned = Variant(steps=self.args.steps)
        model = self.model()
        if self.missing(Variant()):
            self._measure(Variant(), model, 32)
        if self.missing(tuned):
            settings = Settings(
                self.lmbda, self.args.steps, crop=self.args.crop, batch_size=self.args.batch_size
            )
            train(model, self.args.train, settings, checkpoint=self._training(tuned))
            model.update(force=True)  # type: ignore[operator]
            self._measure(tuned, model, 32)

    def quantized_points(self, planner: str, target_cr: float) -> None:
        """Measure the model with one plan: A32 and A8, before and after fine-tuning."""
        variants = [
            Variant(planner, target_cr, bits, steps)
            for bits in self.args.activation_bits
            for steps in (0, self.args.steps)
        ]
        missing = self.missing(*variants)
        if not missing:
            return
        model = self.model()
        prepared = prepare(
            model,
            target_cr,
            calibration=self.args.calibration,
            sensitivity=self.sensitivity(),
            planner=planner,
        )
        for variant in missing:
            # Scales are chosen before activations are quantized, so that both have the same.
            gm = prepared if variant.activation_bits else _weights_only(model, prepared)
            if variant.steps:
                gm = copy.deepcopy(gm)
                finetune(
                    gm,
                    self.args.train,
                    steps=variant.steps,
                    crop=self.args.crop,
                    batch_size=self.args.batch_size,
                    checkpoint=self._training(variant),
                )
            self._measure(variant, gm, plan_of(gm).average_bits)

    def _training(self, variant: Variant) -> Path:
        return self.args.cache / f"{self.name}-{'-'.join(map(str, dataclasses.astuple(variant)))}.pt"

    def _measure(self, variant: Variant, model: nn.Module, weight_bits: float) -> None:
        self.results.add(Point.of(variant, self.lmbda, weight_bits, evaluate(model, self.args.images)))
        self._training(variant).unlink(missing_ok=True)


def _weights_only(model: nn.Module, prepared: fx.GraphModule) -> fx.GraphModule:
    return rewrite(model, dataclasses.replace(plan_of(prepared), activation_bits=None))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="bmshj2018-hyperprior", help="a name of CompressAI's zoo")
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="LMBDA=FILE",
        help="trained weights per lambda; default: the sample models of the package",
    )
    add("--lmbda", type=float, nargs="+", help="measure these lambdas alone; default: all there are")
    add("--calibration", required=True, help="image folder to measure sensitivity on")
    add("--train", required=True, help="image folder to fine-tune on")
    add("--images", required=True, help="image folder to evaluate on")
    add("--planners", nargs="+", default=["adaptive", "uniform", "optimal"])
    add("--target-cr", type=float, nargs="+", default=[0.25, 0.1875, 0.15625, 0.125])
    add("--activation-bits", type=int, nargs="+", default=[0, 8], help="0 is float")
    add("--steps", type=int, default=300, help="of fine-tuning")
    add("--crop", type=int, default=192, help="side of the training crops")
    add("--batch-size", type=int, default=4)
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results and pictures")
    add("--cache", type=Path, default=Path("out/bd_rate"), help="folder for tables and training checkpoints")
    add("--report", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args()
    args.activation_bits = [bits or None for bits in args.activation_bits]
    return args


def main() -> None:
    """Measure what is missing, and print and draw what is there."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    files = {float(lmbda): Path(file) for lmbda, _, file in (text.partition("=") for text in args.checkpoint)}
    lmbdas = list(files) or list(samples.LMBDAS)
    benches = [Bench(args, lmbda, files.get(lmbda)) for lmbda in args.lmbda or lmbdas]
    if not args.report:
        with freed_memory_kept():
            for bench in benches:
                bench.float_points()
            jobs = [(p, cr, bench) for p in args.planners for cr in args.target_cr for bench in benches]
            for planner, cr, bench in tqdm(jobs, desc="plans", unit="plan", disable=None):
                bench.quantized_points(planner, cr)
    everything = [bench.results.points for bench in benches]
    if len(everything) >= 4:
        print_table(everything, args.steps)
        plot_curves(everything, args.steps, args.out / f"bd_rate-{args.model}.png")
    print_losses(everything, args.steps)


if __name__ == "__main__":
    main()
