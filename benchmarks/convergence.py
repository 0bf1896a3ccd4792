"""How far fine-tuning comes, by steps, learning rate and schedule, at several sizes of the file's weights.

Plans of the sample model by `optimal` in coded bytes, with float activations. The RD loss is that of crops which were
not trained on, from the likelihoods, above that of the float model fine-tuned for as many steps. Every result is kept
as soon as it is there, and a run that was stopped goes on: the same command goes on where it was stopped.

    python benchmarks/convergence.py --calibration bsds500/val --train bsds500/train --images kodak
"""

import argparse
import copy
import itertools
import json
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from arguments import add_sample_and_folders, parser_of
from figures import save
from tabulate import tabulate
from torch import fx, nn

from fmpq_fx import finetune, plan_of, prepare, samples
from fmpq_fx.history import History, Settings
from fmpq_fx.images import crops
from fmpq_fx.images.reading import fingerprint, sources
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.trace import trace
from fmpq_fx.report.table import short_bits
from fmpq_fx.storage.files import write_text
from fmpq_fx.training.finetuning import learning_rate
from fmpq_fx.training.loop import train

FLOAT = 1.0  # the "times smaller" of the float model
Row = dict[str, Any]


class Runs:
    """Fine-tuned models, their losses kept in a file so that none is trained twice."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.model = args, samples.model(args.lmbda)
        self.bench = make_bench(trace(self.model), crops.cut(args.images, count=24))
        folders = (fingerprint(sources(x)) for x in (args.calibration, args.train, args.images))
        self._about = f"{'; '.join(folders)}; lambda {args.lmbda:g}"
        self._path = args.out / "convergence-sample.json"
        self._done = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._prepared: dict[float, fx.GraphModule] = {}

    def of(self, smaller: float, steps: int, factor: float = 1, constant: float = 0) -> Row:
        """Return what is left of the weights, the RD loss and the validations of one run; 0 steps train nothing.

        Args:
            smaller: how many times smaller the weights are.
            steps: steps of fine-tuning.
            factor: of the default learning rate.
            constant: the part of the steps before the learning rate falls.
        """
        key = f"{self._about}; {smaller:g}x, {steps} steps, {factor:g} times the learning rate"
        key += f", constant for {constant:g}" if constant else ""
        if key not in self._done:
            start = time.process_time()
            checkpoint = self.args.cache / f"{smaller:g}-{steps}-{factor:g}-{constant:g}.training"
            if smaller == FLOAT:
                model: nn.Module = copy.deepcopy(self.model)
                history = (
                    self._train(model, steps, factor * Settings.lr, constant, checkpoint) if steps else None
                )
                bits, graph = "float", trace(model.eval())
            else:
                graph = self._plan(smaller)
                bits, lr = short_bits(plan_of(graph)), factor * learning_rate(plan_of(graph))
                history = self._finetune(graph, steps, lr, constant, checkpoint) if steps else None
            self._done[key] = {
                "bits": bits,
                "rd": mean_rd(graph, self.bench, self.args.lmbda),
                "minutes": (time.process_time() - start) / 60,
                "curve": [(v.step, v.rd_loss) for v in history.validation] if history else [],
            }
            write_text(self._path, json.dumps(self._done, indent=1) + "\n")
            checkpoint.unlink(missing_ok=True)
            print(f"{key}: {bits}, RD loss {self._done[key]['rd']:.4f}", flush=True)
        return dict(self._done[key])

    def _train(self, model: nn.Module, steps: int, lr: float, constant: float, checkpoint: Path) -> History:
        settings = Settings(
            self.args.lmbda, steps=steps, lr=lr, constant=constant, validate_every=_interval(steps)
        )
        return train(model, self.args.train, settings, checkpoint=checkpoint)

    def _finetune(
        self, gm: fx.GraphModule, steps: int, lr: float, constant: float, checkpoint: Path
    ) -> History:
        return finetune(
            gm,
            self.args.train,
            checkpoint=checkpoint,
            steps=steps,
            lr=lr,
            constant=constant,
            validate_every=_interval(steps),
        )

    def _plan(self, smaller: float) -> fx.GraphModule:
        if smaller not in self._prepared:
            self._prepared[smaller] = prepare(
                copy.deepcopy(self.model),
                smaller,
                calibration=self.args.calibration,
                lmbda=self.args.lmbda,
                activation_bits=None,
                planner="optimal",
                size="coded",
            )
        return copy.deepcopy(self._prepared[smaller])


def main() -> None:
    """Train what is missing, print a row for each run, and draw the validations."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add_sample_and_folders(parser)
    add("--smaller", type=float, nargs="+", default=[4, 8, 12], help="how many times smaller the weights are")
    add("--steps", type=int, nargs="+", default=[150, 600])
    add("--factors", type=float, nargs="+", default=[1, 3], help="of the default learning rate")
    add("--constants", type=float, nargs="+", default=[0], help="part of the steps before the rates fall")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for results and the picture")
    add("--cache", type=Path, default=Path("out/convergence"), help="folder for training checkpoints")
    args = parser.parse_args()
    for folder in (args.out, args.cache):
        folder.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    runs, rows = Runs(args), []
    floats = {steps: runs.of(FLOAT, steps)["rd"] for steps in (0, *args.steps)}
    figure, _ = plt.subplots(1, len(args.smaller), figsize=(4 * len(args.smaller), 3.5), layout="constrained")
    for smaller, panel in zip(args.smaller, figure.axes, strict=True):
        found = runs.of(smaller, 0)
        above = _above(found["rd"], floats[0], floats[0])
        rows.append([f"{smaller:g}x", found["bits"], "-", "-", "-", *above, "-"])
        for steps, factor, constant in itertools.product(args.steps, args.factors, args.constants):
            found = runs.of(smaller, steps, factor, constant)
            above = _above(found["rd"], floats[steps], floats[0])
            settings = str(steps), f"{factor:g}", f"{constant:g}"
            rows.append([f"{smaller:g}x", found["bits"], *settings, *above, f"{found['minutes']:.1f}"])
            label = f"{steps} steps, lr x {factor:g}" + (f", constant {constant:g}" if constant else "")
            panel.plot(*zip(*found["curve"], strict=True), "o-", label=label)
        panel.set(title=f"{smaller:g}x smaller, {found['bits']}", xlabel="step", ylabel="RD loss, validation")
        panel.legend(fontsize=8)
    save(figure, args.out / "convergence-sample.png")
    headers = [
        "weights",
        "bits",
        "steps",
        "lr x",
        "constant",
        "above float, as many steps",
        "above float",
        "CPU minutes",
    ]
    print(f"\n{tabulate(rows, headers, disable_numparse=True, colalign=['right'] * len(headers))}")


def _interval(steps: int) -> int:
    return max(steps // 6, 1)


def _above(rd: float, tuned: float, untuned: float) -> list[str]:
    return [f"{100 * (rd / of - 1):+.2f} %" for of in (tuned, untuned)]


if __name__ == "__main__":
    main()
