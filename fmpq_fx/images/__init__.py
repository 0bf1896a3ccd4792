"""Images: reading files of every kind, cutting crops, and comparing images.

In come folders, files and tensors; out come batches (B, C, H, W) of floats in [0, 1], and MS-SSIM of two images. It
knows no model. It may import ``storage``.
"""
