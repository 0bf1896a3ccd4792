"""The models that the benchmarks measure, with weights from checkpoints if these are given."""

import argparse
from collections.abc import Iterator

import torch
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Elic2022Official,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
)
from torch import Tensor, nn

from fmpq_fx import samples
from fmpq_fx.models.zoo import load_model

UNTRAINED = {
    "mbt2018-mean": lambda: MeanScaleHyperprior(64, 96),
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(64, 96),
    "cheng2020-anchor": lambda: Cheng2020Anchor(32),
}
"""Sizes that a naive loop over all bit-widths gets through in minutes on two cores."""

WITH_CODECS = {
    "cheng2020-checkerboard": lambda: Cheng2020AnchorCheckerboard(32),
    "elic2022-official": lambda: Elic2022Official(32, 64, groups=[8, 8, 16, 32]),
}
"""Models of CompressAI whose latent codecs are one node of the graph each."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--checkpoint NAME=FILE``, which replaces random weights by trained ones."""
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        type=lambda text: tuple(text.split("=", 1)),
        metavar="NAME=FILE",
        help="trained weights, as mbt2018-mean=model.pth; the sample model is trained, all others are random without",
    )


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for models, images and threads of measurements on all models."""
    parser.add_argument("--images", help="calibration images; default: scikit-image's photographs")
    parser.add_argument("--crops", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--lmbda", type=float, default=0.013)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="part of the names of the models to measure")
    add_model_arguments(parser)


def conditions(args: argparse.Namespace) -> str:
    """Return the arguments of :func:`add_measuring_arguments` in words."""
    crops = f"{args.crops} crops of {args.size} x {args.size}"
    return f"{crops}, lambda {args.lmbda}, {args.threads} threads, torch {torch.__version__}"


@torch.no_grad()
def enliven(model: nn.Module, x: Tensor, std: float = 2.0) -> None:
    """Give an untrained ``model`` latents of a trained one's size, ``std``, for the images ``x`` (B, 3, H, W).

    As made, random models have latents that all round to zero, and scales that are all the least: nothing to code, and
    less to compute. So the layers around the hyper-latents get weights that keep the size of what they are given.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith(("g_a", "g_s")):
            nn.init.kaiming_normal_(layer.weight)
    for name, transform in model.named_modules():
        if name.rpartition(".")[2] in ("g_a", "h_a"):
            last = [layer for layer in transform.children() if isinstance(layer, nn.Conv2d)][-1]
            for _ in range(3):  # an attention block after it is not linear
                seen: list[Tensor] = []
                hook = transform.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
                model(x)
                hook.remove()
                for parameter in last.parameters():
                    parameter.mul_(std / seen[0].std())


def bench_models(checkpoints: dict[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (description, model in evaluation mode) of the four models, one at a time."""
    yield "bmshj2018-hyperprior, N=64, M=96, trained", samples.model()
    for name, make in UNTRAINED.items():
        torch.manual_seed(0)
        trained = name in checkpoints
        model = load_model(name, checkpoint=checkpoints[name]) if trained else make().eval()
        yield f"{name}, N={model.N}, M={model.M}, {'trained' if trained else 'random weights'}", model
