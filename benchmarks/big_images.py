"""Big images: peak memory and time of coding and evaluating a photograph within several budgets, beside it as a whole.

The photograph is one of scikit-image's, enlarged. Encoding, decoding and ``evaluate`` have a process of their own each,
with one thread; memory is what the process grows by over what it has with the codec loaded, the image included. "As a
whole" is measured at the first of the sizes alone, where it takes less. What comes out is compared with that of the
whole, or of the largest budget.

    python benchmarks/big_images.py --model model.fmpq
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arguments import parser_of
from machine import forget_peak, in_fresh_process, resident
from tabulate import tabulate
from torch import Tensor

from fmpq_fx import FmpqError, decode, encode, evaluate, load_codec, prepare, samples, save
from fmpq_fx.memory import bytes_of
from fmpq_fx.storage.files import write_text

WHOLE = "1TB"
JOBS = ("encode", "decode", "evaluate")


def photograph(width: int, height: int) -> Tensor:
    """Return an enlarged photograph, (3, height, width)."""
    return F.interpolate(samples.photos()["astronaut"][None], (height, width), mode="bicubic").clamp_(0, 1)[0]


def job(what: str, model: Path, size: tuple[int, int], memory: str, folder: Path, results: Any) -> None:
    """Encode the photograph into ``folder``, decode the file there, or evaluate; measure bytes and seconds."""
    torch.set_num_threads(1)
    codec = load_codec(model)
    small = photograph(64, 64)
    decode(codec, encode(codec, small))
    forget_peak()
    before = resident("VmRSS")
    image = photograph(*size) if what != "decode" else None
    made = resident("VmHWM")  # enlarging takes memory of its own
    forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    out = None
    if image is None:
        out = decode(codec, (folder / "image.fmi").read_bytes(), memory=memory)
    elif what == "encode":
        (folder / "image.fmi").write_bytes(encode(codec, image, memory=memory))
    else:
        try:
            evaluate(codec, {"photograph": image}, memory=memory, progress=False)
        except FmpqError as error:  # with images of several stages in memory it needs more than coding
            results.put({"refused": str(error)})
            return
    took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    peak = resident("VmHWM") - before
    if out is not None:
        torch.save(out, folder / "image.pt")
    results.put({**took, "peak": peak, "made": made - before})


def measure(model: Path, size: tuple[int, int], memory: str, folder: Path) -> dict[str, Any]:
    """Return the measurements of all jobs within ``memory``, and keep their files in ``folder``."""
    folder.mkdir()
    found = {what: in_fresh_process(job, what, model, size, memory, folder) for what in JOBS}
    return {"size": list(size), "memory": memory, "bytes": (folder / "image.fmi").stat().st_size, **found}


def differences(folder: Path, reference: Path) -> dict[str, Any]:
    """Return how the files in ``folder`` differ from those in ``reference``."""
    ours, theirs = (torch.load(place / "image.pt") for place in (folder, reference))
    same = (folder / "image.fmi").read_bytes() == (reference / "image.fmi").read_bytes()
    apart = (ours - theirs).abs_()
    levels = (255 * ours).round_() != (255 * theirs).round_()
    return {"same_bitstream": same, "largest": float(apart.max()), "levels": int(levels.sum())}


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="a model file; default: the sample model at 8 bits")
    add("--size", type=_size, default=(6000, 4000), metavar="WxH", help="of the big photograph")
    add("--memory", nargs="+", default=["4GB", "2GB"], metavar="SIZE", help="budgets for it")
    add("--small-size", type=_size, default=(3000, 2000), metavar="WxH", help="that is coded as a whole, too")
    add("--small-memory", nargs="+", default=["1GB", "500MB"], metavar="SIZE", help="budgets for that")
    add("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or _sample(Path(temporary))
        for size, budgets in ((args.small_size, [WHOLE, *args.small_memory]), (args.size, args.memory)):
            reference = Path(temporary) / f"{size}-{budgets[0]}"
            for memory in budgets:
                folder = Path(temporary) / f"{size}-{memory}"
                row = measure(model, size, memory, folder)
                rows.append({**row, **differences(folder, reference)})
                print(_table(rows), flush=True)
    write_text(args.out / "big_images.json", json.dumps(rows, indent=1) + "\n")


def _sample(folder: Path) -> Path:
    gm = prepare(samples.model(), 0.25, lmbda=0.013, bits=[8], planner="uniform")
    save(gm, folder / "model.fmpq")
    return folder / "model.fmpq"


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        first = next(other for other in rows if other["size"] == row["size"])
        line = ["x".join(map(str, row["size"])), "whole" if row["memory"] == WHOLE else row["memory"]]
        for what in JOBS:
            if "refused" in row[what]:
                line += ["refused", ""]
                continue
            peak, cpu = row[what]["peak"], row[what]["cpu"]
            share = "" if row["memory"] == WHOLE else f" ({100 * peak / bytes_of(row['memory']):.0f} %)"
            line += [f"{peak / 1e9:.2f} GB{share}", f"{cpu:.1f} s {cpu / first[what]['cpu']:.2f}x"]
        line.append("same" if row["same_bitstream"] else f"{row['bytes'] - first['bytes']:+d} bytes")
        line += [f"{row['largest']:.1e}", f"{row['levels']}"]
        lines.append(line)
    headers = [
        "size",
        "memory",
        "encode: peak",
        "CPU",
        "decode: peak",
        "CPU",
        "evaluate: peak",
        "CPU",
        "bitstream",
        "largest",
        "levels",
    ]
    return tabulate(lines, headers, disable_numparse=True)


if __name__ == "__main__":
    main()
