"""Images in: reading files of every kind, cutting crops, and judging what came out.

In come folders, files and tensors; out come batches (B, 3, H, W) of floats in [0, 1], and MS-SSIM of two images. It
knows no model. It may import ``storage``.
"""
