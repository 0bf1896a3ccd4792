"""How a model's forward becomes a graph: it runs on an example, and every operation is recorded beside its value.

In comes a model and an image; out come the nodes, with sizes computed by the graph, writes made functional, and the
conditions on which the forward decided kept as guards. It is what :mod:`fmpq_fx.passes.trace` is made of, and may
import ``quant`` and what lies below it.
"""
