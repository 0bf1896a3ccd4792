"""Decide which modules are kept whole, and make modules for calls that must be kept whole too."""

from typing import Any

from compressai.entropy_models import EntropyModel
from compressai.latent_codecs import LatentCodec
from torch import fx, nn

from fmpq_fx.passes.tracing.turns import TRACING, Thread
from fmpq_fx.quant import QuantizedLayer, QuantizeLatent, argument_names, in_order, quantized_class


def kept_whole(module: nn.Module) -> bool:
    """Say whether a call of ``module`` becomes one node instead of being traced into.

    These are layers that can be quantized, entropy models and latent codecs, and the layers of torch and einops.
    """
    if quantized_class(module) is not None:
        return True
    if isinstance(module, EntropyModel | LatentCodec | QuantizeLatent | QuantizedLayer):
        return True
    package = type(module).__module__
    # CompressAI's operations are autograd functions in modules.
    of_library = package.startswith(("torch.nn.", "torch.ao.nn.", "einops.", "compressai.ops."))
    return of_library and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


class FunctionCall(nn.Module):
    """A call of a user's autograd function, with the backward that the user wrote.

    Args:
        function: a subclass of ``torch.autograd.Function``.
    """

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        """Return the result of the function for ``args``."""
        return self.function.apply(*args)


class NetworkTracer(fx.Tracer):
    """Records a network inside a model symbolically, since its input has no example; it has the same leaves."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of ``root``, a module, while no other thread traces."""
        with TRACING:
            self._thread = Thread()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of ``m``, its arguments by position; calls in other threads run as usual."""
        if not self._thread.is_current():
            return forward(*args, **kwargs)
        if kept_whole(m):
            args, kwargs = in_order(argument_names(m), args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return the proxy of ``attr_val``, an attribute of a module; in other threads, return it itself."""
        if not self._thread.is_current():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether ``m`` becomes one node."""
        return kept_whole(m)
