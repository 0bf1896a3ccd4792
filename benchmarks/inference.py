"""Inference: transforms and whole codecs in eager torch, its variants, other runtimes, and in integers.

For each model, 512 x 768, the transforms alone (analysis, synthesis) and encoding and decoding with real bitstreams,
all variants in turn in one run, so that a busy machine slows all of them alike; medians, and ratios to eager float32.
Peak memory is that of the synthesis in a process of its own, with one thread. The RD loss is measured on crops of the
images.

    python benchmarks/inference.py --images ../data/kodak --calibration ../data/bsds500/val
"""

import argparse
import copy
import json
import pickle
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arguments import add_activation_bits, parser_of
from compressai.models import MeanScaleHyperprior, ScaleHyperprior
from machine import forget_peak, in_fresh_process, processor, resident
from tabulate import tabulate
from torch import Tensor, fx, nn

from fmpq_fx import convert, export_onnx, plan_of, prepare, samples
from fmpq_fx.coding.codec import as_it_runs
from fmpq_fx.images import crops
from fmpq_fx.models.zoo import load_model
from fmpq_fx.onnx.codec import with_sessions
from fmpq_fx.onnx.runtimes import OpenVinoSession
from fmpq_fx.passes.plan.planners import PLANNERS
from fmpq_fx.passes.plan.widths import MIXED
from fmpq_fx.passes.swap import with_replaced
from fmpq_fx.rd import RDSums, rd_sums
from fmpq_fx.report.table import short_bits
from fmpq_fx.storage.files import write_text

HEIGHT, WIDTH = 512, 768
MODELS: dict[str, Callable[[], nn.Module]] = {
    "scale 64": samples.model,
    "mean-scale 64": lambda: MeanScaleHyperprior(64, 96),
    "scale 128": lambda: ScaleHyperprior(128, 192),
    "mean-scale 128": lambda: MeanScaleHyperprior(128, 192),
}
EAGER = "eager float32"
MOST_TIMES = 10
"""Of the time of eager float32, that bfloat16 may take: without instructions for it, torch takes a hundred."""
Job = Callable[[], Any]


class Variant:
    """A codec and how its transforms are called."""

    def __init__(self, codec: nn.Module, *, channels_last: bool = False, bfloat16: bool = False):
        moved: Any = codec.to(memory_format=torch.channels_last) if channels_last else codec
        self.codec = moved
        self.channels_last, self.bfloat16 = channels_last, bfloat16
        self.analysis: Callable[..., Any] = as_it_runs(moved, "g_a")
        self.synthesis: Callable[..., Any] = as_it_runs(moved, "g_s")

    def within(self, call: Callable[..., Any], *arguments: Any) -> Job:
        """Return a job that calls ``call`` as this variant does."""

        def job() -> Any:
            context = torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext()
            with torch.no_grad(), context:
                return call(*arguments)

        return job

    def jobs(self, x: Tensor) -> dict[str, Job]:
        """Return the jobs that are timed, for the image ``x`` (1, 3, H, W)."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = self.codec.g_a(x).round()
        coded = self.codec.compress(x)

        jobs = {"analysis": self.within(self.analysis, x), "synthesis": self.within(self.synthesis, y)}
        if not self.bfloat16:  # entropy models need float32
            jobs["encode"] = self.within(self.codec.compress, x)
            jobs["decode"] = self.within(self.codec.decompress, coded["strings"], coded["shape"])
        return jobs


def variants(graphs: dict[str, fx.GraphModule], model: Any, folder: Path) -> dict[str, Variant]:
    """Return all variants of ``model``; ``graphs`` are its quantized graphs, by their mean bits."""
    found = {
        EAGER: Variant(copy.deepcopy(model)),
        "channels_last": Variant(copy.deepcopy(model), channels_last=True),
        "bfloat16 autocast": Variant(copy.deepcopy(model), bfloat16=True),
    }
    small = timed(
        {(name, ""): found[name].within(found[name].analysis, torch.rand(1, 3, 64, 64)) for name in found}, 3
    )
    if (times := small["bfloat16 autocast", ""] / small[EAGER, ""]) > MOST_TIMES:
        print(f"bfloat16 autocast is left out: it takes {times:.0f} times as long here")
        del found["bfloat16 autocast"]
    compiled = Variant(copy.deepcopy(model))
    compiled.analysis, compiled.synthesis = (torch.compile(m) for m in (model.g_a, model.g_s))
    try:
        with torch.no_grad():
            compiled.analysis(torch.rand(1, 3, HEIGHT, WIDTH))
        found["torch.compile"] = compiled
    except Exception as error:  # it needs a compiler, which not every machine has
        print(f"torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0]}")
    everything_float = prepare(model, 1.0, calibration=torch.rand(1, 3, 64, 64), bits=[10], fixed={"*": None})
    runtimes: dict[str, dict[str, Any]] = {
        "ONNX Runtime": {"backend": "onnxruntime"},
        "OpenVINO": {"backend": "openvino"},
        "OpenVINO bfloat16": {"backend": "openvino", "precision": "bf16"},
    }
    for bits, gm in {"float32": everything_float, **graphs}.items():
        for runtime, options in runtimes.items():
            form = "onnxruntime" if bits in graphs and runtime == "ONNX Runtime" else "portable"
            place = folder / f"{bits}_{form}"
            if not place.exists():
                export_onnx(gm, place, form=form)
            found[f"{bits}, {runtime}"] = Variant(with_sessions(convert(gm), place, **options))
    found["float32 as torch exports it, OpenVINO bfloat16"] = Variant(exported_by_torch(model))
    return found


def exported_by_torch(model: Any) -> nn.Module:
    """Return ``model`` with its transforms in OpenVINO with bfloat16, as they are without this package."""
    auto = torch.export.Dim.AUTO
    x = torch.rand(2, 3, 128, 256)  # torch takes a size of 1 for fixed
    sessions = {}
    for transform, example in ((model.g_a, x), (model.g_s, model.g_a(x))):
        program = torch.onnx.export(
            transform, (example,), dynamo=True, dynamic_shapes=({0: auto, 2: auto, 3: auto},), verbose=False
        )
        assert program is not None
        sessions[transform] = OpenVinoSession(program.model_proto.SerializeToString(), precision="bf16")
    return with_replaced(model, sessions)


def rd_of(variant: Variant, batches: list[Tensor], lmbda: float) -> float:
    """Return the RD loss of a variant; transforms in bfloat16, entropy models in float32."""
    codec = variant.codec
    if variant.bfloat16:
        codec = with_replaced(codec, {module: InBfloat16(module) for module in (codec.g_a, codec.g_s)})
    with torch.no_grad():
        return sum((rd_sums(codec(x), x) for x in batches), RDSums()).rd(lmbda)


class InBfloat16(nn.Module):
    """Runs a module in bfloat16, and returns float32."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x``."""
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.module(x)
            return out.float()


def timed(jobs: dict[tuple[str, str], Job], repeats: int) -> dict[tuple[str, str], float]:
    """Return the median seconds of each job; they take turns."""
    for job in jobs.values():
        job()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for _ in range(repeats):
        for key, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def peak_memory(variant: Variant, y: Tensor) -> float:
    """Return by how many MB memory grows in a fresh process that loads ``variant`` and synthesizes from ``y``."""
    grown: int = in_fresh_process(_synthesize, pickle.dumps((variant, y)))
    return grown / 2**20


def _synthesize(pickled: bytes, results: Any) -> None:
    torch.set_num_threads(1)
    forget_peak()
    before = resident("VmRSS")
    variant, y = pickle.loads(pickled)
    variant.within(variant.synthesis, y)()
    results.put(resident("VmHWM") - before)


def main() -> None:
    """Print a table per model and number of threads, and write all as JSON."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--checkpoint", type=Path, nargs="+", default=[], help="trained weights, in the order of --models")
    add("--calibration", help="image folder; default: scikit-image's photographs")
    add("--images", help="image folder to measure the RD loss on; default: the calibration")
    add("--crops", type=int, default=12)
    add("--target-cr", type=float, default=0.25)
    add("--planner", choices=PLANNERS, default="uniform")
    add_activation_bits(parser, [8, MIXED])
    add("--lmbda", type=float, default=0.013)
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--repeats", type=int, default=7)
    add("--skip-memory", action="store_true", help="do not measure memory, which takes a process per variant")
    add("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    print(f"processor: {processor()}")
    content = []
    batches = crops.cut(args.images, count=args.crops) if args.images else crops.batches(args.calibration)
    for index, name in enumerate(args.models):
        model = _trained(name, args.checkpoint[index] if index < len(args.checkpoint) else None)
        for threads in args.threads:
            torch.set_num_threads(threads)
            rows = measure(name, model, batches, args)
            print(
                f"\n{name}, {threads} thread{'s' * (threads > 1)}, {WIDTH} x {HEIGHT}\n\n{_table(rows)}",
                flush=True,
            )
            content.append({"model": name, "threads": threads, "rows": rows})
    write_text(args.out / "inference.json", json.dumps(content, indent=1) + "\n")


def _trained(name: str, checkpoint: Path | None) -> nn.Module:
    torch.manual_seed(0)
    if checkpoint is None:
        model = MODELS[name]()
        print(
            f"{name}: {'the sample model' if name == 'scale 64' else 'random weights: its RD loss says nothing'}"
        )
    else:
        zoo = "mbt2018-mean" if name.startswith("mean") else "bmshj2018-hyperprior"
        model = load_model(zoo, checkpoint=checkpoint)
    model.update(force=True)  # type: ignore[operator]
    return model.eval()


def measure(name: str, model: Any, batches: list[Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per variant: RD loss, memory in MB, and seconds of each job."""
    graphs = {}
    for bits in args.activation_bits:
        gm = prepare(
            model,
            args.target_cr,
            calibration=args.calibration,
            lmbda=args.lmbda,
            planner=args.planner,
            activation_bits=bits,
        )
        graphs[short_bits(plan_of(gm))] = gm
    print(f"{name}: {args.planner}, {', '.join(graphs)}", flush=True)
    photo = samples.photos()["astronaut"][None]
    x = F.interpolate(photo, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = variants(graphs, model, Path(folder))
        rd = {key: rd_of(variant, batches, args.lmbda) for key, variant in found.items()}
        fake = {f"{bits}, fake-quantized": Variant(convert(gm)) for bits, gm in graphs.items()}
        rd.update((key, rd_of(variant, batches, args.lmbda)) for key, variant in fake.items())
        jobs = {(key, what): job for key, variant in found.items() for what, job in variant.jobs(x).items()}
        seconds = timed(jobs, args.repeats)
        y = model.g_a(x).round()
        measured = {} if args.skip_memory else {k: v for k, v in found.items() if "compile" not in k}
        memory = {key: peak_memory(variant, y) for key, variant in measured.items()}
    return [
        {
            "variant": key,
            "rd": rd[key],
            "memory": memory.get(key),
            "seconds": {what: value for (variant, what), value in seconds.items() if variant == key},
        }
        for key in [*found, *fake]
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    reference = rows[0]
    lines = []
    for row in rows:
        line = [row["variant"], f"{100 * (row['rd'] / reference['rd'] - 1):+.2f} %"]
        line.append("-" if row["memory"] is None else f"{row['memory']:.0f}")
        for what in ("analysis", "synthesis", "encode", "decode"):
            value = row["seconds"].get(what)
            line.append("-" if value is None else f"{value:.3f} s {reference['seconds'][what] / value:.2f}x")
        lines.append(line)
    headers = ["variant", "RD loss", "MB", "analysis", "synthesis", "encode", "decode"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


if __name__ == "__main__":
    main()
