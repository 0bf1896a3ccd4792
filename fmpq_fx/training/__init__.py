"""Fine-tuning: training a quantized graph, or a float model, with the RD loss.

In come a model and photographs; out come its best weights and the history of the training. It may import ``images``,
``storage``, the passes and ``quant``.
"""
