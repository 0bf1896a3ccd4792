"""The points where numbers are clipped: the scales of weights and the ranges of activations.

In come a quantized graph and images; out comes the same graph, with scales that were chosen by the RD loss and ranges
that were fitted to the values of the inputs. It may import ``passes.measure`` and the rooms below it.
"""
