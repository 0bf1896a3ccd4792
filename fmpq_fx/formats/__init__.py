"""The files that hold models: ``.fmpq``, which ships, and state files, from which training goes on.

In comes a quantized graph; out comes a file, and from the file the same graph again, bit for bit, or its codec. The
encodings inside of files lie in ``storage``. It may import ``onnx``, ``coding`` and the rooms below them.
"""
