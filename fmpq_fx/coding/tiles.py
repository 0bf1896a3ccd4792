"""Run a transform in tiles that overlap by its receptive field, so that the result is the same as in one piece.

A tile of the output is computed from all of the input that it sees. At the borders of the read part, layers pad, and
places come out wrong. So only places are kept that see no border, except the borders of the image itself. Along one
axis, for three tiles::

    input    ├────────────────────────────────────────┤
    read     ├──────────────────┤                           by the first tile
                       ├───────────────────┤                by the second
                                   ├──────────────────┤     by the third
    keep     ├─────────────┤                                of the first tile's output
                           ├───────────┤
                                       ├──────────────┤
    output   ├─────────────┼───────────┼──────────────┤     the place of each

So there are no seams: the result is that of the whole input, up to the rounding of sums that a library adds up in
another order.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from fmpq_fx.coding.footprint import peak_bytes
from fmpq_fx.errors import FmpqError
from fmpq_fx.exact import ExactLayer
from fmpq_fx.passes.receptive_field import Reach, Reaches, layer_reach, receptive_field
from fmpq_fx.passes.tracing.leaves import NetworkTracer
from fmpq_fx.quant import CalledAlike

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Span:
    """A tile's part of one axis."""

    read: slice  # the part of the input that is read
    keep: slice  # the part of the tile's output that is kept
    place: slice  # its place in the whole output


@dataclass(frozen=True)
class Grid:
    """The division of a transform into tiles."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    out: Size  # size of the whole output
    peak: int = 0  # bytes that a tile takes, with everything that is computed from it

    @property
    def largest(self) -> Size:
        """Height and width of the largest tile of the input."""
        height, width = (max(map(_read, spans)) for spans in (self.rows, self.columns))
        return height, width

    @property
    def work(self) -> int:
        """The number of input places that all tiles read together."""
        return sum(map(_read, self.rows)) * sum(map(_read, self.columns))


class Transform:
    """The description of a module that takes one feature map and returns one: its reach and its memory.

    Args:
        module: a torch module. A backend that runs in its place computes the same, and runs in the same tiles.
    """

    def __init__(self, module: nn.Module):
        self.graph = module
        self.reaches: Reaches | None = None
        self.obstacle = ""  # the reason that it cannot run in tiles
        # Peaks and output shapes so far.
        self.sizes: dict[tuple[object, ...], tuple[int, tuple[int, ...]]] = {}
        try:
            if isinstance(module, ExactLayer):
                self.reaches = layer_reach(module)
            else:
                graph = fx.GraphModule(module, NetworkTracer().trace(module))
                self.graph = graph
                self.reaches = receptive_field(graph)
        except FmpqError as error:
            self.obstacle = str(error)
        except Exception as error:  # a user's module may do anything
            self.obstacle = f"it cannot be traced: {error}"

    def peak(self, like: Tensor, size: Size) -> int:
        """Return the bytes that it takes for an input of ``size``, with batch, channels and dtype of ``like``."""
        return self._tried(like, size)[0]

    def _tried(self, like: Tensor, size: Size) -> tuple[int, tuple[int, ...]]:
        key = (*like.shape[:2], *size, like.dtype)
        if key not in self.sizes:
            self.sizes[key] = peak_bytes(self.graph, (*like.shape[:2], *size), like.dtype)
        return self.sizes[key]

    def grid(self, like: Tensor, budget: int) -> Grid:
        """Return the grid of the least work whose tiles take at most ``budget`` bytes.

        If there is none, return the grid of the smallest tiles: its ``peak`` is the least that is needed.

        Args:
            like: the input, (B, C, H, W), or a tensor like it without data.
            budget: bytes for one tile and everything that is computed from it.

        Raises:
            FmpqError: the transform cannot run in tiles.
        """
        if self.reaches is None:
            raise FmpqError(self.obstacle)
        height, width = self._tried(like, (like.size(-2), like.size(-1)))[1][-2:]
        rows, columns = map(_divisions, self.reaches, like.shape[-2:], (height, width))
        grids = [Grid(r, c, (height, width)) for r in rows for c in columns]
        smallest = min(grids, key=lambda grid: (math.prod(grid.largest), grid.work))
        density = 0.0  # bytes per input place, of the last grid that was tried
        for grid in sorted(grids, key=lambda grid: grid.work):
            area = math.prod(grid.largest)
            if area * density <= budget:
                peak = self.peak(like, grid.largest)
                if peak <= budget:
                    return replace(grid, peak=peak)
                density = peak / area
        return replace(smallest, peak=self.peak(like, smallest.largest))


class Tiled(CalledAlike):
    """Runs a module in tiles if the whole would take more than ``budget`` bytes.

    Args:
        transform: the description of the module, or of the torch module that it stands for.
        module: the module that runs, (B, C, H, W) -> (B, C, H, W).
        budget: bytes. If no tile takes so few, the smallest tiles are run.
    """

    def __init__(self, transform: Transform, module: nn.Module, budget: int):
        super().__init__(module)
        self.transform, self.budget = transform, budget
        self.module = module
        self.small = 0  # elements of the largest input that is known to fit

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` (B, C, H, W)."""
        if x.numel() > self.small:
            if self.transform.peak(x, (x.size(-2), x.size(-1))) > self.budget:
                return self._in_tiles(x)
            self.small = x.numel()
        whole: Tensor = self.module(x)
        return whole

    def _in_tiles(self, x: Tensor) -> Tensor:
        grid = self.transform.grid(x, self.budget)
        out: Tensor | None = None
        for row in grid.rows:
            for column in grid.columns:
                # A copy, since the module may write to its input, and tiles overlap.
                tile = self.module(x[..., row.read, column.read].clone())
                if out is None:
                    out = tile.new_empty((*tile.shape[:-2], *grid.out))
                out[..., row.place, column.place] = tile[..., row.keep, column.keep]
        assert out is not None
        return out


def untiled(module: nn.Module) -> nn.Module:
    """Return the module inside ``module`` if that is :class:`Tiled`, else ``module``."""
    if isinstance(module, Tiled):
        module = module.module
    return module


def _divisions(reach: Reach, inputs: int, places: int) -> list[tuple[Span, ...]]:
    """Return the ways to divide an axis of ``inputs`` and ``places`` of output, the shortest tiles last."""
    # Places; tiles that begin at a multiple of this begin at whole inputs.
    unit = int(reach.align / reach.stride)
    units = -(-places // unit)
    lengths = sorted({-(-units // count) * unit for count in range(1, units + 1)}, reverse=True)
    return [tuple(_span(reach, inputs, a, min(a + n, places)) for a in range(0, places, n)) for n in lengths]


def _span(reach: Reach, inputs: int, first: int, end: int) -> Span:
    """Return the span of the output places ``first`` … ``end`` - 1 of an axis of ``inputs``."""
    low, high = reach.inputs(first, end - 1)
    start = min(max(low, 0), inputs - 1) // reach.align * reach.align
    stop = min(inputs, -(-(max(high, start) + 1) // reach.align) * reach.align)
    skipped = int(start / reach.stride)
    return Span(slice(start, stop), slice(first - skipped, end - skipped), slice(first, end))


def _read(span: Span) -> int:
    return int(span.read.stop - span.read.start)
