"""A small compression model of one's own: traced and quantized without registering anything.

    python examples/custom_model.py

The weights are random, so the numbers say nothing; a trained model is handled the same way. All that is asked
of it is a forward that torch.fx can trace and that returns ``x_hat`` and ``likelihoods``.
"""

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN
from torch import Tensor, nn

import fmpq_fx


class Gate(nn.Module):
    """A residual branch that is weighed per channel: a module that neither torch nor CompressAI knows."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Conv2d(channels, channels, 3, padding=1)
        self.weigh = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W) plus its weighed branch."""
        weights = torch.sigmoid(self.weigh(x.mean((2, 3))))
        out: Tensor = F.relu(self.branch(x), inplace=True)
        out = out * weights.unflatten(1, (-1, 1, 1))
        out += x
        return out


class TinyCodec(nn.Module):
    """An analysis and a synthesis transform around an entropy bottleneck; stride 8."""

    def __init__(self, channels: int = 32, latents: int = 48):
        super().__init__()
        self.analysis = nn.Sequential(
            nn.Conv2d(3, channels, 5, stride=4, padding=2),
            GDN(channels),
            Gate(channels),
            nn.Conv2d(channels, latents, 5, stride=2, padding=2),
        )
        self.entropy_bottleneck = EntropyBottleneck(latents)
        self.synthesis = nn.Sequential(
            nn.ConvTranspose2d(latents, channels, 5, stride=2, padding=2, output_padding=1),
            Gate(channels),
            GDN(channels, inverse=True),
            nn.Conv2d(channels, 3 * 16, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """Code the images ``x`` (B, 3, H, W) in [0, 1]."""
        y_hat, likelihoods = self.entropy_bottleneck(self.analysis(x))
        return {"x_hat": self.synthesis(y_hat), "likelihoods": {"y": likelihoods}}


def main() -> None:
    """Quantize the model to a sixth of its size, with its last layer kept at 8 bits."""
    torch.manual_seed(0)
    gm = fmpq_fx.prepare(TinyCodec().eval(), target_cr=6, fixed={"synthesis.3": 8})
    print(fmpq_fx.bit_table(gm))
    gm.print_readable()


if __name__ == "__main__":
    main()
