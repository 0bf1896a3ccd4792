"""Small models that are quick to measure, and images for them."""

from collections.abc import Callable

import torch
from compressai.models import JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior, ScaleHyperprior
from torch import Tensor, nn

SMALL: dict[str, Callable[[], nn.Module]] = {
    "bmshj2018-hyperprior": lambda: ScaleHyperprior(8, 12),
    "mbt2018-mean": lambda: MeanScaleHyperprior(8, 12),
    "mbt2018": lambda: JointAutoregressiveHierarchicalPriors(12, 12),
}


def small_model(name: str) -> nn.Module:
    """Return a small model with random weights that are large enough for its latents not to be all zero."""
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    with torch.no_grad():
        for module_name in ("g_a.6", "h_a.4"):
            model.get_parameter(f"{module_name}.weight").mul_(20)
    return model


def images() -> Tensor:
    """Return two smooth random images, (2, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
