"""Measure how many bytes the model file's entropy coder takes for each site at each width."""

from collections.abc import Iterable, Mapping

from torch import fx
from tqdm import tqdm

from fmpq_fx.passes.sites import find_sites
from fmpq_fx.passes.tables import Table
from fmpq_fx.quant import quantize_layer
from fmpq_fx.weight_coder import coded_bytes


def measure_coded_sizes(
    gm: fx.GraphModule,
    bits: Iterable[int],
    given: Mapping[str, int | None],
    *,
    progress: bool | None = None,
) -> Table:
    """Return the bytes of each site of ``gm`` at each of ``bits``, with min-max scales.

    Args:
        gm: a traced model.
        bits: candidate widths.
        given: sites whose width is fixed, to what; those are coded at that width alone, or not at all where it
            is None.
        progress: show a progress bar; None shows it on terminals only.
    """
    candidates = tuple(bits)
    table: Table = {site.name: {} for site in find_sites(gm)}
    jobs = [(site, b) for site in table for b in ((given[site],) if site in given else candidates)]
    hide = None if progress is None else not progress
    for site, b in tqdm(jobs, desc="coded sizes", unit="width", disable=hide, leave=False):
        if b is not None:
            layer = quantize_layer(gm.get_submodule(site), b)
            quantizer = layer.weight_quantizer
            integers = layer.integers.cpu().long().numpy()
            table[site][b] = float(coded_bytes(integers, quantizer.low, quantizer.high))
    return table
