"""Quantize a trained model four times smaller, look at the plan, and run the result.

python examples/quickstart.py
"""

import torch

import fmpq_fx


def main() -> None:
    """Print the bit-width table of the sample model at CR 0.25, and run the rewritten graph on a photograph."""
    model = fmpq_fx.samples.model()
    gm = fmpq_fx.prepare(model, target_cr=0.25)
    print(fmpq_fx.bit_table(gm))

    # What comes back is a GraphModule that is called like the model.
    photo = fmpq_fx.samples.photos()["astronaut"].unsqueeze(0)
    with torch.no_grad():
        before, after = model(photo)["x_hat"], gm(photo)["x_hat"]
    for name, x_hat in (("float32", before), ("quantized", after)):
        print(f"{name}: PSNR {-10 * torch.log10((x_hat.clamp(0, 1) - photo).square().mean()):.2f} dB")


if __name__ == "__main__":
    main()
