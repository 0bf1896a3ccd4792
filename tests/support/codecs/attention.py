"""Attention within windows: feature maps are padded to whole windows, as their sizes say, and masks are kept."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from support.codecs.small import N, Small

WINDOW = 3
HEADS = 2


class Windows(nn.Module):
    """Attention in windows that are shifted by one place, with a mask that is made for the size that came last."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(N, 3 * N), nn.Linear(N, N)
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW**2, WINDOW**2))
        self.size: Any = None
        self.mask: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended ``x`` (B, C, H, W)."""
        b, c, h, w = x.shape
        assert c % HEADS == 0, "the heads do not divide the channels"
        down, right = (WINDOW - h % WINDOW) % WINDOW, (WINDOW - w % WINDOW) % WINDOW
        if down > 0 or right > 0:
            x = F.pad(x, (0, right, 0, down))
        if self.size != (h + down, w + right):
            self.size, self.mask = (h + down, w + right), self.made_mask(h + down, w + right, x.device)
        shifted = torch.roll(x, (-1, -1), (2, 3)).permute(0, 2, 3, 1)
        windows = partitioned(shifted)
        q, k, v = (
            self.qkv(windows).reshape(len(windows), WINDOW**2, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(c // HEADS) + self.bias
        scores = scores.view(b, -1, HEADS, WINDOW**2, WINDOW**2) + self.mask[None, :, None]
        mixed = scores.view(-1, HEADS, WINDOW**2, WINDOW**2).softmax(-1) @ v
        mixed = self.project(mixed.transpose(1, 2).reshape(-1, WINDOW, WINDOW, c))
        rows, columns = (h + down) // WINDOW, (w + right) // WINDOW
        merged = mixed.view(b, rows, columns, WINDOW, WINDOW, c).permute(0, 1, 3, 2, 4, 5)
        whole = torch.roll(merged.reshape(b, h + down, w + right, c), (1, 1), (1, 2)).permute(0, 3, 1, 2)
        return whole[:, :, :h, :w].contiguous()

    def made_mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return what keeps places that a shift brought together apart."""
        areas = torch.zeros((1, height, width, 1), device=device)
        number = 0
        for rows in (slice(0, -WINDOW), slice(-WINDOW, -1), slice(-1, None)):
            for columns in (slice(0, -WINDOW), slice(-WINDOW, -1), slice(-1, None)):
                areas[:, rows, columns] = number
                number += 1
        flat = partitioned(areas).view(-1, WINDOW**2)
        apart = flat.unsqueeze(1) - flat.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


def partitioned(x: Tensor) -> Tensor:
    """Return the windows of ``x`` (B, H, W, C), as (windows, places, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW * WINDOW, c)


class WindowAttention(Small):
    """Window attention with padding, and a mask that is kept for the last size."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Windows()

    def analysis(self, x: Tensor) -> Tensor:
        y = super().analysis(x)
        attended: Tensor = y + self.attention(y)
        return attended


class EinopsAttention(Small):
    """Global attention, its axes moved by einops: functions, a layer, and one that is made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(N, 3 * N)
        self.to_places = Rearrange("b c h w -> b (h w) c")

    def analysis(self, x: Tensor) -> Tensor:
        y = super().analysis(x)
        h, w = y.shape[2:]
        q, k, v = rearrange(self.qkv(self.to_places(y)), "b p (three c) -> three b p c", three=3)
        mixed = (q @ rearrange(k, "b p c -> b c p")).softmax(-1) @ v
        attended: Tensor = y + Rearrange("b (h w) c -> b c h w", h=h, w=w)(mixed)
        return attended
