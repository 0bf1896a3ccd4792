"""Quantization of latents inside a model's forward, as a module that a graph can hold."""

from compressai.entropy_models import EntropyModel
from torch import Tensor, nn


class QuantizeLatent(nn.Module):
    """Additive uniform noise in training, rounding in evaluation, as CompressAI's autoregressive models do it.

    Their forward says ``entropy_model.quantize(y, "noise" if self.training else "dequantize")``, a choice that
    tracing would freeze: the graph would round in training as well, and no gradient would reach the analysis
    transform. As a module the choice stays open.
    """

    def forward(self, y: Tensor, means: Tensor | None = None) -> Tensor:
        """Return ``y`` (any shape) with noise in [-0.5, 0.5), or rounded about ``means``."""
        quantized: Tensor = EntropyModel.quantize(self, y, "noise" if self.training else "dequantize", means)
        return quantized
