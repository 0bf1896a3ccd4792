"""Turn a model's forward into a graph: it runs on an example, and every operation is recorded beside its value.

In come a model and an image; out come the nodes. The graph computes sizes itself, its writes are functional, and the
conditions on which the forward decided are kept as guards. :mod:`fmpq_fx.passes.trace` is made of this room. It may
import ``quant`` and the rooms below it.
"""
