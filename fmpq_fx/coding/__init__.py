"""Real bitstreams: codecs that compress and decompress within a given memory, and the evaluation of their results.

In come a quantized graph and images; out come a codec of the user's own class, strings, .fmi files, images and their
evaluation. It may import everything but ``onnx``, ``formats``, ``report`` and ``cli``.
"""
