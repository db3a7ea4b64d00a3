"""Rotary position embedding as transformers computes it: angles in fp32, applied in the model's dtype."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rope_frequencies_on(device: torch.device, head_dim: int, theta: float) -> Tensor:
    """`rope_frequencies` on a device; made once, since a CUDA graph cannot wait for a copy."""
    return rope_frequencies(head_dim, theta).to(device)


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Inverse frequencies, fp32 [head_dim / 2]."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions [N], each [N, 1, d]: the axis of heads is broadcast."""
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [N, H, d], pairing dimension i with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
