r"""Count images that fail to decode under another setting than they were encoded under: float, guarded float, integers.

An image fails if the decoder gets another symbol than the encoder had, or notices that it would; in integers, if a
latent differs in any bit. Then the costs of the guard and of exactness are measured: bits on the wire against the same
plan with a float entropy path, before and after fine-tuning, and the time to encode and decode against the float model
in CompressAI's own code.

    python benchmarks/cross_setting.py --calibration ../data/bsds500/val --images ../data/kodak --lmbda 0.013
    python benchmarks/cross_setting.py --model mbt2018-mean --checkpoint mbt2018-mean=mean-scale.pth \
        --calibration ../data/bsds500/val --images ../data/kodak --training ../data/bsds500/train --steps 150
    python benchmarks/cross_setting.py --model mbt2018 cheng2020-anchor cheng2020-checkerboard elic2022-official \
        --images ../data/kodak --count 3 --planner uniform --bits 6

A GPU is one of the settings where there is one.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from arguments import parser_of
from bench_models import UNTRAINED, WITH_CODECS, add_model_arguments, enliven
from tabulate import tabulate
from torch import Tensor, nn

from fmpq_fx import FmpqError, convert, exact_table, finetune, prepare
from fmpq_fx.coding.codec import codec_of
from fmpq_fx.coding.frame import Frame
from fmpq_fx.coding.guarded import Coded, Robust, compress, decompress
from fmpq_fx.images import crops, reading
from fmpq_fx.models.zoo import load_model
from fmpq_fx.progress import reported

LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
MOST = 2**31  # symbols of an image, which is trusted here
SETTINGS = ("1 thread", "2 threads", "no oneDNN", *LAYOUTS, "float64", "compiled")
GPU = "GPU"


class Latents(nn.Module):
    """Replaces the synthesis transform and keeps its input, since latents are compared and not pictures."""

    def forward(self, y_hat: Tensor) -> Tensor:
        """Return ``y_hat`` as it is."""
        self.seen = y_hat.double()
        return y_hat.clone()


@contextmanager
def setting(which: str, codec: Any) -> Iterator[Any]:
    """Give a copy of ``codec`` as it is to be used in the block."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    twin = copy.deepcopy(codec)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_num_threads(2 if which == "2 threads" else 1)
        if which == "no oneDNN":
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if which == "float64":
            torch.set_default_dtype(torch.float64)
            twin = twin.double()
        if which in LAYOUTS:
            twin = twin.to(memory_format=LAYOUTS[which])
        if which == "compiled":
            compile_networks(twin)
        if which == GPU:
            twin = twin.cuda()
        yield twin


def compile_networks(codec: nn.Module) -> None:
    """Compile the networks of ``codec`` between latents and CDFs; coding loops stay Python."""
    for parent in list(codec.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Sequential) and name not in ("g_a", "g_s", "h_a"):
                child.compile(dynamic=True)


def encode_all(codec: Any, which: str, pictures: list[Tensor], robust: Robust) -> list[Coded]:
    """Return each of ``pictures`` (1, 3, H, W) as ``codec`` encodes it under a setting."""
    with setting(which, codec) as encoder:
        moved = (x.to(next(encoder.parameters())) for x in pictures)
        layout = LAYOUTS.get(which, torch.contiguous_format)
        coder = codec_of(encoder)
        return [compress(coder, x.contiguous(memory_format=layout), robust) for x in moved]


def decode_all(codec: Any, which: str, coded: list[Coded]) -> list[Tensor]:
    """Return the latents that the decoder has for each of ``coded`` under a setting, NaN if it refuses."""
    with setting(which, codec) as decoder:
        decoder.g_s = Latents()
        coder, found = codec_of(decoder), []
        for each in coded:
            try:
                decompress(coder, each, MOST)
                found.append(decoder.g_s.seen.cpu())
            except FmpqError:
                found.append(torch.tensor(torch.nan))
        return found


def failures(
    codec: Any,
    pictures: list[Tensor],
    tolerance: float,
    name: str,
    settings: list[str],
    robust: Robust = None,
) -> list[list[str]]:
    """Return a row per encoder's setting: how many pictures fail under each decoder's."""
    rows = []
    for encoder in reported(settings, name, "setting"):
        coded = encode_all(codec, encoder, pictures, robust)
        expected = decode_all(codec, encoder, coded)
        counts = [
            sum(
                not bool((ours - theirs).abs().max() <= tolerance)
                for ours, theirs in zip(expected, decode_all(codec, decoder, coded), strict=True)
            )
            for decoder in settings
        ]
        rows.append([name, encoder, *map(str, counts)])
    return rows


def coded_bytes(codec: Any, pictures: list[Tensor]) -> int:
    """Return the bytes of all strings of ``pictures``."""
    return sum(len(s) for x in pictures for group in codec.compress(x)["strings"] for s in group)


def print_guard(model: nn.Module, pictures: list[Tensor]) -> None:
    """Print the cost of guarding the float model."""
    codec, ratios, shares = codec_of(model), [], []
    for x in reported(pictures, "guard", "image"):
        start = time.process_time()
        plain = compress(codec, x, None)
        middle = time.process_time()
        coded = compress(codec, x, "guarded")
        encoded = (time.process_time() - middle) / (middle - start)
        start = time.process_time()
        decompress(codec, plain, MOST)
        middle = time.process_time()
        decompress(codec, coded, MOST)
        ratios.append((encoded, (time.process_time() - middle) / (middle - start)))
        shares.append(len(coded.guard) / sum(len(s) for group in plain.strings for s in group))
    encode, decode = (statistics.median(times) for times in zip(*ratios, strict=True))
    mean, most = 100 * statistics.mean(shares), 100 * max(shares)
    print(
        f"guarding the float model: {mean:.3f} % more bytes, at most {most:.3f} %; "
        f"encoding takes {encode:.2f} times as long, decoding {decode:.2f} times (medians)\n"
    )


def seconds(codecs: dict[str, Any], pictures: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Return the median seconds of processor time to encode and decode a picture, by codec, in turn on one thread."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in codecs}
    for x in reported(pictures, "time", "image"):
        for name, codec in codecs.items():
            start = time.process_time()
            coded = codec.compress(x)
            middle = time.process_time()
            codec.decompress(coded["strings"], coded["shape"])
            taken[name].append((middle - start, time.process_time() - middle))
    return {
        name: (statistics.median(e for e, _ in times), statistics.median(d for _, d in times))
        for name, times in taken.items()
    }


def padded(path: Path) -> Tensor:
    """Return the picture (1, 3, H, W), padded as for coding."""
    x = reading.read(path)
    return Frame(*x.shape[-2:]).around(x).unsqueeze(0)


def report(name: str, args: argparse.Namespace, pictures: list[Tensor]) -> None:
    """Print all about one model: failures per pair of settings, bytes, times, and what each layer sums in."""
    checkpoint = dict(args.checkpoint).get(name)
    torch.manual_seed(0)
    untrained = {**UNTRAINED, **WITH_CODECS}.get(name) if checkpoint is None else None
    model: Any = load_model(name, checkpoint=checkpoint) if untrained is None else untrained()
    model = model.eval()
    if untrained is not None:
        enliven(model, pictures[0][..., :256, :256])
    model.update()
    gm = prepare(
        model,
        args.target_cr,
        calibration=crops.batches(args.calibration),
        lmbda=args.lmbda,
        bits=args.bits,
        planner=args.planner,
    )
    with torch.no_grad():
        ours, inexact = convert(gm, exact="require"), convert(gm, exact=False)
        print(f"{name}, {'random' if untrained else 'trained'} weights\n\n{exact_table(ours)}\n")
        rows = failures(model, pictures, 0.5, "float model", args.settings)
        rows += failures(model, pictures, 0.5, "float, guarded", args.settings, "guarded")
        rows += failures(ours, pictures, 0.0, "ours", args.settings)
        headers = ["", "encoded with", *(f"decoded with {which}" for which in args.settings)]
        print(f"images of {len(pictures)} that fail:")
        alignment = ("left", "left", *["right"] * len(args.settings))
        print(tabulate(rows, headers, disable_numparse=True, colalign=alignment) + "\n")
        print_guard(model, pictures)
        print_bytes("before fine-tuning", ours, inexact, pictures)
    if args.steps:
        finetune(gm, args.training or args.calibration, lmbda=args.lmbda, steps=args.steps)
    with torch.no_grad():
        if args.steps:
            tuned = convert(gm, exact="require"), convert(gm, exact=False)
            print_bytes(f"after {args.steps} steps of fine-tuning", *tuned, pictures)
        print_times({"float model": model, "plan, float path": inexact, "plan, exact": ours}, pictures)


def print_bytes(when: str, ours: nn.Module, inexact: nn.Module, pictures: list[Tensor]) -> None:
    """Print the bytes that two codecs of one graph make."""
    sizes = [coded_bytes(codec, pictures) for codec in (ours, inexact)]
    share = 100 * (sizes[0] / sizes[1] - 1)
    print(f"bytes {when}: {sizes[0]}, with a float entropy path {sizes[1]}: {share:+.3f} %")


def print_times(codecs: dict[str, Any], pictures: list[Tensor]) -> None:
    """Print the seconds per picture, the first codec's being 1."""
    times = seconds(codecs, pictures)
    base = next(iter(times.values()))
    rows = [
        [name, *(f"{t:.3f}" for t in pair), *(f"{t / b:.2f}" for t, b in zip(pair, base, strict=True))]
        for name, pair in times.items()
    ]
    headers = ["", "encode (s)", "decode (s)", "encode / float", "decode / float"]
    print("\n" + tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4)) + "\n")


def main() -> None:
    """Print the report of every model that was asked for."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--model", nargs="+", default=["sample"], help="'sample' or names of CompressAI's zoo"
    )
    add_model_arguments(parser)
    parser.add_argument("--calibration", help="image folder; default: scikit-image's photographs")
    parser.add_argument("--images", required=True, type=Path, help="image folder")
    parser.add_argument("--count", type=int, help="of the images; default: all")
    there = [*SETTINGS, *([GPU] if torch.cuda.is_available() else [])]
    parser.add_argument("--settings", nargs="+", choices=there, default=there)
    parser.add_argument("--lmbda", type=float, default=0.013)
    parser.add_argument("--target-cr", type=float, default=0.1875)
    parser.add_argument("--planner", default="adaptive")
    parser.add_argument("--bits", type=int, nargs="+", help="candidates; default: 2 to 10")
    parser.add_argument(
        "--steps", type=int, default=0, help="of fine-tuning, after which bytes are compared again"
    )
    parser.add_argument("--training", help="image folder for that; default: that of --calibration")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [padded(path) for path in reading.find(args.images)[: args.count]]
    for name in args.model:
        report(name, args, pictures)


if __name__ == "__main__":
    main()
