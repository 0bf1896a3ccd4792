r"""Train small models from an image folder, as those that come with the package were trained.

    python benchmarks/train_models.py photos/ --lmbda 0.0035 --steps 23000 --out models/
    python benchmarks/train_models.py photos/ --lmbda 0.0067 --steps 8000 --init models/….pth --out models/
    python benchmarks/train_models.py photos/ --validation other/ --arch cheng2020-anchor -N 48 --lmbda 0.013 \
        --steps 40000 --batch-size 16 --device cuda --out models/

Each file is {"arch", "N", "M", "lmbda", "steps", "state_dict"}, with CDF tables; `pack_model.py` makes a small
file of it. The same command goes on where it was stopped; on a GPU, where a step takes milliseconds
(`gpu_training.py`), it begins anew.
"""

from collections.abc import Callable
from pathlib import Path

import gpu_training
import torch
from arguments import parser_of
from compressai.entropy_models import EntropyBottleneck
from compressai.models import Cheng2020Anchor, MeanScaleHyperprior, ScaleHyperprior
from torch import nn

from fmpq_fx.history import Settings
from fmpq_fx.images.reading import sources
from fmpq_fx.models.zoo import load_model
from fmpq_fx.progress import reported
from fmpq_fx.storage.files import replacing
from fmpq_fx.training.loop import train

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "bmshj2018-hyperprior": ScaleHyperprior,
    "mbt2018-mean": MeanScaleHyperprior,
    "cheng2020-anchor": lambda n, m: Cheng2020Anchor(n),  # its latents have as many channels as its layers
}


def settle_quantiles(model: nn.Module, steps: int, lr: float) -> None:
    """Train only the quantiles of entropy bottlenecks, so that medians and tables fit the learned distributions."""
    bottlenecks = [m for m in model.modules() if isinstance(m, EntropyBottleneck)]
    optimizer = torch.optim.Adam([m.quantiles for m in bottlenecks], lr)
    for _ in reported(range(steps), "quantiles", "step"):
        optimizer.zero_grad()
        torch.stack([m.loss() for m in bottlenecks]).sum().backward()
        optimizer.step()


def main() -> None:
    """Train one model and write its checkpoint."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="image folders to train on")
    add("--arch", choices=list(MODELS), default="bmshj2018-hyperprior")
    add("-N", type=int, default=64, help="channels of the transforms")
    add("-M", type=int, default=96, help="channels of the latents")
    add("--lmbda", type=float, required=True, help="weight of the distortion")
    add("--steps", type=int, default=20000)
    add("--init", type=Path, metavar="F", help="begin with the weights of this checkpoint, of another lambda")
    add("--validation", type=Path, metavar="DIR", help="default: some of the images are held out")
    add("--batch-size", type=int, default=8)
    add("--crop", type=int, default=128)
    add("--lr", type=float, default=3e-4, help="constant, then a cosine to 0 over the last 40 %%")
    add(
        "--quantile-steps",
        type=int,
        default=2000,
        help="of the entropy bottleneck's quantiles alone, at the end",
    )
    add("--validate-every", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--bfloat16", action="store_true", help="compute the transforms in bfloat16")
    add("--device", default="cpu")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--workers", type=int, help="processes that read images ahead")
    add("--out", type=Path, default=Path("out/models"), metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device != "cpu"
    if on_gpu and (args.bfloat16 or args.workers is not None):
        raise SystemExit("--bfloat16 and --workers are for training on a CPU")
    if on_gpu and args.validation is None:
        raise SystemExit("training on a GPU needs images to validate on: --validation DIR")
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.out / f"{args.arch}-n{args.N}-m{args.M}-lmbda{args.lmbda:.4f}.pth"
    torch.manual_seed(args.seed)
    model = load_model(args.arch, checkpoint=args.init) if args.init else MODELS[args.arch](args.N, args.M)
    model = model.to(args.device).train()
    settings = Settings(
        args.lmbda,
        steps=args.steps,
        batch_size=args.batch_size,
        crop=args.crop,
        lr=args.lr,
        constant=0.6,
        bfloat16=args.bfloat16,
        validate_every=args.validate_every,
        seed=args.seed,
    )
    checkpoint = path.with_suffix(".training")
    images = [source for folder in args.images for source in sources(folder)]
    if on_gpu:
        history = gpu_training.train(model, images, settings, sources(args.validation))
    else:
        history = train(
            model,
            images,
            settings,
            validation=args.validation,
            identity=f"{args.arch}, N={args.N}, M={args.M}, from {args.init or 'random weights'}",
            checkpoint=checkpoint,
            workers=args.workers,
        )
    print(history)
    settle_quantiles(model, args.quantile_steps, settings.aux_lr)
    model = model.cpu().eval()
    model.update(force=True)  # type: ignore[operator]
    about = {"arch": args.arch, "N": args.N, "M": args.M, "lmbda": args.lmbda, "steps": args.steps}
    with replacing(path) as file:
        torch.save({**about, "state_dict": model.state_dict()}, file)
    history.save(path.with_suffix(".json"))
    checkpoint.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
