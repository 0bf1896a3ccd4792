"""Train the transforms in bfloat16, and all that decides on rates in float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from compressai.entropy_models import EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fmpq_fx.quant import QuantizeLatent


@contextmanager
def transforms_in_bfloat16(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, the convolutions of ``model`` compute in bfloat16 and its entropy models in float32.

    A likelihood is a small difference of two cumulative probabilities, which the 8 bits of bfloat16's mantissa do
    not hold, and a latent above 256 that was rounded in bfloat16 is not even an integer. So entropy models, the
    rounding of latents, and latent codecs as a whole, which round in their own way, get float32 and run outside of
    autocast.
    """
    exact = [m for m in model.modules() if isinstance(m, EntropyModel | LatentCodec | QuantizeLatent)]
    kept = [vars(module).get("forward") for module in exact]
    try:
        for module in exact:
            vars(module)["forward"] = partial(_in_float32, module.forward, device.type)
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        for module, forward in zip(exact, kept, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _in_float32(forward: Callable[..., Any], device_type: str, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(device_type, enabled=False):
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return forward(*args, **kwargs)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
