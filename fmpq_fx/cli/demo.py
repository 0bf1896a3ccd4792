"""The main job on the sample model: quantize it, measure the cost on other images, and code an image with it."""

import argparse
from pathlib import Path

from tabulate import tabulate
from torch import Tensor, fx

from fmpq_fx import samples
from fmpq_fx.cli.outputs import IMAGE_MARK, MODEL_MARK, Output, declare
from fmpq_fx.coding import fmi
from fmpq_fx.formats.model_file import load_codec, save
from fmpq_fx.images import crops, reading
from fmpq_fx.passes.annotation import plan_of
from fmpq_fx.passes.measure.bench import make_bench, mean_rd
from fmpq_fx.passes.rewrite import activations_float
from fmpq_fx.passes.trace import trace
from fmpq_fx.pipeline import analyze, prepare
from fmpq_fx.rd import psnr
from fmpq_fx.report.file_bytes import file_report
from fmpq_fx.report.picture import plot_plan
from fmpq_fx.report.table import bit_table, factor, short_bits
from fmpq_fx.storage.files import replacing

TARGET_CR = 0.1875
"""6 of 32 bits, the size of a model with 6 bits everywhere."""

LMBDA = 0.013
"""The lambda that the sample model was trained with."""

_PICTURE, _MODEL, _CODED, _DECODED = "plan.png", "model.fmpq", "motorcycle.fmi", "motorcycle.png"


def add_demo(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``demo``."""
    command.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for the picture")
    writes = [(_PICTURE, IMAGE_MARK), (_MODEL, MODEL_MARK), (_CODED, fmi.MAGIC), (_DECODED, IMAGE_MARK)]
    declare(command, reads=[], writes=[("out", _in_folder(*of)) for of in writes])
    command.set_defaults(run=lambda args: demo(args.out))


def _in_folder(name: str, mark: bytes) -> Output:
    return Output(mark, check=lambda path: None, files=lambda args, folder: [folder / name])


def demo(out: Path) -> None:
    """Quantize the sample model to 6 bits per weight, by FMPQ and uniformly, and compare on held-out photographs.

    Prints the bit-width table and the comparison, draws the plan in ``out``/plan.png, writes the model file
    ``out``/model.fmpq, and codes a photograph with it, ``out``/motorcycle.fmi and .png.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = samples.model(LMBDA)
    table = analyze(model, lmbda=LMBDA)
    by_fmpq = prepare(model, TARGET_CR, sensitivity=table)
    uniform = prepare(model, TARGET_CR, sensitivity=table, planner="uniform")
    print(bit_table(by_fmpq))

    held_out = samples.held_out_photos()
    batches = crops.cut(list(held_out.values()))
    float_model = trace(model)
    bench = make_bench(float_model, batches)
    float_rd = mean_rd(float_model, bench, LMBDA)
    print(
        f"\nOn photographs that were not calibrated on ({crops.describe(batches)} of {', '.join(held_out)}):\n"
    )
    rows: list[list[str]] = [["float32", "W32A32", "1.000", f"{float_rd:.4f}", "", ""]]
    for name, gm in (("FMPQ", by_fmpq), ("uniform", uniform)):
        plan = plan_of(gm)
        rd = mean_rd(gm, bench, LMBDA)
        with activations_float(gm):
            weights_rd = mean_rd(gm, bench, LMBDA)
        changes = [f"{100 * (value / float_rd - 1):+.2f} %" for value in (weights_rd, rd)]
        rows.append([name, short_bits(plan), f"{plan.cr:.3f}", f"{rd:.4f}", *changes])
    headers = ["model", "bits", "CR", "RD loss", "weights only", "inputs rounded too"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5)))
    picture = out / _PICTURE
    plot_plan(by_fmpq, picture)
    print(f"\nRD loss = bits per pixel + {LMBDA} * 255^2 * MSE, before any fine-tuning. Picture: {picture}")
    _code(by_fmpq, held_out["motorcycle"], out)


def _code(gm: fx.GraphModule, photo: Tensor, out: Path) -> None:
    """Write the model file of ``gm``, and ``photo`` coded with the codec in that file."""
    model_path, coded_path = out / _MODEL, out / _CODED
    save(gm, model_path)
    report = file_report(model_path)
    codec = load_codec(model_path)
    data = fmi.encode(codec, photo)
    with replacing(coded_path) as file:
        file.write(data)
    decoded = (fmi.decode(codec, data) * 255).round() / 255
    reading.write(decoded, out / _DECODED)
    mse = (decoded - photo).square().mean().item()
    print(
        f"\nModel file: {model_path}, {report.size:,} bytes for {report.float_bytes:,.0f} bytes of float32 weights "
        f"({factor(report.size / report.float_bytes)}).\nA photograph through it: {coded_path}, {len(data):,} bytes, "
        f"{8 * len(data) / photo[0].numel():.3f} bits per pixel, PSNR {psnr(mse):.2f} dB."
    )
