"""Where numbers are clipped: the scales of weights and the ranges of activations.

In come a quantized graph and images; out comes the same graph with each scale and range chosen by the RD loss. It may
import ``passes.measure`` and what lies below it.
"""
