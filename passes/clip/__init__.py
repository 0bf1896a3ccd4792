"""Where numbers are clipped: the scales of weights and the ranges of activations.

In come a quantized graph and images; out comes the same graph, with scales that were chosen by the RD loss and ranges
that were fitted to what inputs are like. It may import ``passes.measure`` and what lies below it.
"""
