"""Plans and files for people: the bit-width table, the picture, the bytes of a file, the exact layers.

In come a quantized graph, a codec or a file; out come texts and pictures. It may import everything but ``cli``.
"""
