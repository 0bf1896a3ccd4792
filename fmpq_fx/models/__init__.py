"""Find and load models: by names of CompressAI's zoo, from checkpoints, and from callables of the user's own.

In come a name and files; out comes a model with its weights, or the identity of a model, from which it can be made
again. It may import ``storage`` and the rooms below it.
"""
