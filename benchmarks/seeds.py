"""How much of a figure is chance: plans from other calibration crops, and fine-tuning with other random numbers.

Calibration: the crops are chosen by each seed, and every plan is fine-tuned with seed 0. Fine-tuning: the plan of
calibration seed 0 is fine-tuned with each seed, and so is the float model, which it is compared with. The RD loss is
that of crops which were not trained on, from the likelihoods. Every result is kept as soon as it is there.

    python benchmarks/seeds.py --calibration bsds500/val --train bsds500/train --images kodak
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arguments import add_activation_bits, add_sample_and_folders, parser_of
from tabulate import tabulate
from torch import fx, nn

from fmpq_fx import finetune, plan_of, prepare, samples
from fmpq_fx.history import Settings
from fmpq_fx.images import crops
from fmpq_fx.images.reading import fingerprint, sources
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.plan.widths import MIXED
from fmpq_fx.passes.trace import trace
from fmpq_fx.report.table import short_bits
from fmpq_fx.storage.files import write_text
from fmpq_fx.training.loop import train


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add_sample_and_folders(parser)
    add("--calibration-seeds", type=int, default=5)
    add("--training-seeds", type=int, default=3)
    add("--target-cr", type=float, default=0.1875)
    add("--planner", default="optimal")
    add_activation_bits(parser, [MIXED])
    add("--steps", type=int, default=150, help="of fine-tuning")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results")
    args = parser.parse_args()
    if len(args.activation_bits) > 1:
        parser.error("--activation-bits takes one value here")
    return args


class Losses:
    """RD losses on the test crops, kept in a file so that none is measured twice."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.model = args, samples.model(args.lmbda)
        self.bench = make_bench(trace(self.model), crops.cut(args.images, count=24))
        folders = "; ".join(fingerprint(sources(x)) for x in (args.calibration, args.train, args.images))
        bits = " ".join(map(str, args.activation_bits))
        self._about = (
            f"{folders}; {args.planner}, CR {args.target_cr:g}, activations {bits}, {args.steps} steps"
        )
        self._path = args.out / f"seeds-sample-{args.lmbda:.4f}.json"
        self._done = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._prepared: dict[int, fx.GraphModule] = {}  # by seed of the calibration crops

    def of(self, name: str, make: Callable[..., nn.Module], *seeds: int) -> float:
        """Return the RD loss of the model that ``make`` returns for ``seeds``; it is kept under ``name`` and these."""
        name = " ".join((name, *map(str, seeds)))
        key = f"{self._about}; {name}"
        if key not in self._done:
            model = make(*seeds).eval()
            graph = model if isinstance(model, fx.GraphModule) else trace(model)
            bits = short_bits(plan_of(model)) if isinstance(model, fx.GraphModule) else "float"
            self._done[key] = {"bits": bits, "rd": mean_rd(graph, self.bench, self.args.lmbda)}
            write_text(self._path, json.dumps(self._done, indent=1) + "\n")
            print(f"{name}: {bits}, RD loss {self._done[key]['rd']:.4f}", flush=True)
        return float(self._done[key]["rd"])

    def float_model(self) -> nn.Module:
        """Return the sample model."""
        model: nn.Module = copy.deepcopy(self.model)
        return model

    def prepared(self, seed: int) -> fx.GraphModule:
        """Return the model prepared on the crops that ``seed`` chooses."""
        if seed not in self._prepared:
            self._prepared[seed] = prepare(
                self.float_model(),
                self.args.target_cr,
                calibration=crops.cut(self.args.calibration, seed=seed),
                lmbda=self.args.lmbda,
                planner=self.args.planner,
                activation_bits=self.args.activation_bits[0],
            )
        return copy.deepcopy(self._prepared[seed])

    def finetuned(self, calibration_seed: int, seed: int) -> fx.GraphModule:
        """Return the model prepared on crops of one seed, fine-tuned with another seed."""
        gm = self.prepared(calibration_seed)
        finetune(gm, self.args.train, steps=self.args.steps, seed=seed)
        return gm

    def finetuned_float(self, seed: int) -> nn.Module:
        """Return the float model, fine-tuned for the same steps."""
        model = self.float_model()
        train(model, self.args.train, Settings(self.args.lmbda, steps=self.args.steps, seed=seed))
        return model


def main() -> None:
    """Measure missing losses, and print a row for each kind of chance."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    losses = Losses(args)
    float_rd = losses.of("float", losses.float_model)
    calibrations, trainings = range(args.calibration_seeds), range(args.training_seeds)
    floats = np.array([losses.of("float fine-tuned", losses.finetuned_float, s) for s in trainings])
    before = np.array([losses.of("prepared", losses.prepared, s) for s in calibrations])
    by_calibration = np.array([losses.of("fine-tuned", losses.finetuned, s, 0) for s in calibrations])
    by_training = np.array([losses.of("fine-tuned", losses.finetuned, 0, s) for s in trainings])
    rows = [
        ["calibration", "no", "float", *_summary(before / float_rd - 1)],
        ["calibration", "yes", "float, fine-tuned", *_summary(by_calibration / floats[0] - 1)],
        ["fine-tuning", "yes", "float, fine-tuned", *_summary(by_training / floats - 1)],
        ["fine-tuning", "yes", "float", *_summary(floats / float_rd - 1)],
    ]
    headers = ["seeds of", "fine-tuned", "compared with", "seeds", "mean", "standard deviation", "range"]
    print()
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] * 3 + ["right"] * 4))
    print(
        "\nRD loss above that of the model it is compared with; the last row is the float model's own fine-tuning"
    )


def _summary(above: np.ndarray) -> list[str]:
    percent = 100 * above
    low, high = f"{percent.min():+.2f}", f"{percent.max():+.2f}"
    return [
        str(len(percent)),
        f"{percent.mean():+.2f} %",
        f"{percent.std(ddof=1):.2f} %",
        f"{low} … {high} %",
    ]


if __name__ == "__main__":
    main()
