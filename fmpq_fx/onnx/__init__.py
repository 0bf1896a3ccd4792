"""Other runtimes: a quantized graph as ONNX graphs, and a codec whose transforms ONNX Runtime runs.

In comes a quantized graph; out come a folder of ONNX files with a manifest, and a codec that runs them. It may import
``coding`` and the rooms below it. The packages onnx and onnxruntime are imported when they are needed.
"""
