"""The files that models live in: ``.fmpq``, which ships, and state files, which are trained on.

In comes a quantized graph; out comes a file, and from the file the same graph again, bit for bit, or its codec. What
any file is built of lies in ``storage``. It may import ``onnx``, ``coding`` and what lies below them.
"""
