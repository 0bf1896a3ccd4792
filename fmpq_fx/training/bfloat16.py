"""Train the transforms in bfloat16, and the modules that decide on rates in float32."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    rounding of latents, and whole latent codecs, which round in their own way, get float32 and run without autocast.
    """
    outside: list[torch.autocast] = []  # one for each of the modules that are running

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        outside.append(torch.autocast(device.type, enabled=False))
        outside[-1].__enter__()
        return tree_map_only(Tensor, _widened, (args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        outside.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, EntropyModel | LatentCodec | QuantizeLatent):
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        with torch.autocast(device.type, torch.bfloat16):
            yield


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
