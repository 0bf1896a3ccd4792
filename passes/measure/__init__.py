"""What a change costs: the RD loss of a graph with one of its layers exchanged, by running no more than that needs.

In come a graph, images and changes; out come RD losses, the sensitivity table made of them, and the plan that rests on
as few of them as possible. It may import ``passes`` and ``passes.plan``.
"""
