"""From a float model to a fine-tuned quantized codec, measured on real bitstreams before and after.

    python examples/finetune.py photos/ --test test_photos/

Interrupt it at any time: the same command goes on where it was.
"""

import argparse
from pathlib import Path

from tabulate import tabulate

import fmpq_fx


def main() -> None:
    """Quantize the sample model to 4 bits per weight, fine-tune it on a folder, and print the results of each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of images to train on")
    parser.add_argument(
        "--test", type=Path, help="folder of images to evaluate on; default: scikit-image's photos"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checkpoint", type=Path, default=Path("finetune.training"))
    args = parser.parse_args()
    test = args.test or fmpq_fx.samples.held_out_photos()

    model = fmpq_fx.samples.model()
    gm = fmpq_fx.prepare(model, target_cr=0.125, calibration=args.images, lmbda=0.013)
    results = {"float32": fmpq_fx.evaluate(model, test), "4 bits": fmpq_fx.evaluate(gm, test)}
    print(fmpq_fx.finetune(gm, args.images, steps=args.steps, checkpoint=args.checkpoint))
    results["4 bits, fine-tuned"] = fmpq_fx.evaluate(gm, test)
    rows = [(name, f"{e.bpp:.4f}", f"{e.psnr:.2f}", f"{e.ms_ssim:.4f}") for name, e in results.items()]
    print(tabulate(rows, ("model", "bpp", "PSNR (dB)", "MS-SSIM"), disable_numparse=True))


if __name__ == "__main__":
    main()
