"""Measure how many bytes the model file's entropy coder takes for each site at each width."""

from collections.abc import Iterable, Mapping

from torch import fx, nn

from fmpq_fx.passes.plan.tables import Table
from fmpq_fx.passes.sites import find_sites
from fmpq_fx.progress import reported
from fmpq_fx.quant import QuantizedLayer, quantize_layer, quantized_layers
from fmpq_fx.ranks import ALONE, Ranks
from fmpq_fx.storage.weight_coder import coded_bytes


def measure_coded_sizes(
    gm: fx.GraphModule,
    bits: Iterable[int],
    given: Mapping[str, int | None],
    *,
    ranks: Ranks = ALONE,
    progress: bool | None = None,
) -> Table:
    """Return the bytes of each site of ``gm`` at each of ``bits``, with min-max scales.

    Args:
        gm: a traced model.
        bits: candidate widths.
        given: the width of each fixed site, which is coded at that width alone, or not at all if it is None.
        ranks: the processes that share the work.
        progress: False shows nothing; see :func:`fmpq_fx.progress.reported`.
    """
    candidates = tuple(bits)
    table: Table = {site.name: {} for site in find_sites(gm)}
    jobs = [
        (site, b)
        for site in table
        for b in ((given[site],) if site in given else candidates)
        if b is not None
    ]
    bar = reported(ranks.share(jobs), "coded sizes", "width", show=progress)
    sizes = ranks.merge([coded_size(quantize_layer(gm.get_submodule(site), b)) for site, b in bar])
    for (site, b), size in zip(jobs, sizes, strict=True):
        table[site][b] = size
    return table


def coded_size(layer: QuantizedLayer) -> float:
    """Return how many bytes the model file takes for the weights of ``layer``."""
    quantizer = layer.weight_quantizer
    return float(coded_bytes(layer.integers.cpu().long().numpy(), quantizer.low, quantizer.high))


def coded_cr(model: nn.Module, ranks: Ranks = ALONE) -> float:
    """Return the coded bytes of the quantized weights of ``model`` / their float32 bytes. ``ranks`` share the work."""
    layers = list(quantized_layers(model).values())
    sizes = ranks.merge([coded_size(layer) for layer in ranks.share(layers)])
    return sum(sizes) / sum(4 * layer.float_weight().numel() for layer in layers)
