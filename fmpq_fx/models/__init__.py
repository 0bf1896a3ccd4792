"""Where models come from: names of CompressAI's zoo, checkpoints, and callables of the user's own.

In come a name and files; out comes a model with its weights, or what a file has to say of a model so that it can be
made again. It may import ``storage`` and what lies below it.
"""
