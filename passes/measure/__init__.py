"""Measure the RD loss of a graph with some of its layers exchanged, and run as little of the graph as that needs.

In come a graph, images and changes; out come RD losses, the sensitivity table made of them, and a plan that needed as
few of them as possible. It may import ``passes`` and ``passes.plan``.
"""
