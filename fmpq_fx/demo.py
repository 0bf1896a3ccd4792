"""The main job on the embedded sample: quantize a trained model, and see what that costs on other images."""

from pathlib import Path

from tabulate import tabulate

from fmpq_fx import images, samples
from fmpq_fx.passes.functionalize import functionalize
from fmpq_fx.passes.incremental import mean_rd
from fmpq_fx.passes.rewrite import activations_float, plan_of
from fmpq_fx.passes.trace import trace
from fmpq_fx.picture import plot_plan
from fmpq_fx.prepare import analyze, prepare
from fmpq_fx.report import bit_table

TARGET_CR = 0.1875
"""6 of 32 bits: the size of uniform 6 bits."""

LMBDA = 0.013
"""What the sample model was trained with."""


def demo(out: Path) -> None:
    """Quantize the sample model to 6 bits per weight, by FMPQ and uniformly, and compare on held-out photographs.

    Prints the bit-width table and the comparison, and draws the plan in ``out``/plan.png.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = samples.model(LMBDA)
    table = analyze(model, lmbda=LMBDA)
    by_fmpq = prepare(model, TARGET_CR, sensitivity=table)
    uniform = prepare(model, TARGET_CR, sensitivity=table, planner="uniform")
    print(bit_table(by_fmpq))

    held_out = samples.held_out_photos()
    batches = images.crops(list(held_out.values()))
    float_rd = mean_rd(functionalize(trace(model)), batches, LMBDA)
    print(
        f"\nOn photographs that were not calibrated on ({images.describe(batches)} of {', '.join(held_out)}):\n"
    )
    rows: list[list[str]] = [["float32", "32", "1.000", f"{float_rd:.4f}", "", ""]]
    for name, gm in (("FMPQ", by_fmpq), ("uniform", uniform)):
        plan = plan_of(gm)
        rd = mean_rd(gm, batches, LMBDA)
        with activations_float(gm):
            weights_rd = mean_rd(gm, batches, LMBDA)
        changes = [f"{100 * (value / float_rd - 1):+.2f} %" for value in (weights_rd, rd)]
        rows.append([name, f"{plan.average_bits:.2f}", f"{plan.cr:.3f}", f"{rd:.4f}", *changes])
    headers = ["model", "bits", "CR", "RD loss", "weights only (A32)", "with 8-bit activations (A8)"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5)))
    picture = out / "plan.png"
    plot_plan(by_fmpq, picture)
    print(f"\nRD loss = bits per pixel + {LMBDA} * 255^2 * MSE, before any fine-tuning. Picture: {picture}")
