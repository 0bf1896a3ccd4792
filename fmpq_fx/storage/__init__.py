"""Bytes on disk: writing files, and reading them back without trusting them.

In come arrays, JSON and names; out come files that are whole or not there, containers with a version and a checksum
over every byte, tensors packed small, integers entropy-coded, and digests that tell whether two models are the same.
It knows quantized layers, and no graph. It may import ``quant`` and ``exact``.
"""
