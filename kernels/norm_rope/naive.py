"""Oracle of the norms and rotations between a decoder's products: fp32 torch, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axes_of_pairs(sections: Sequence[int], *, interleaved: bool) -> Tensor:
    """Which axis of its position turns each pair of channels (M-RoPE): int32 [sum(sections)].

    In sections (Qwen2-VL, Qwen2.5-VL) or interleaved (Qwen3-VL), where pair i takes axis i mod 3 as long as
    that axis has pairs left, and the first axis after that.
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections)).int()
    pair = torch.arange(sum(sections))
    axis = pair % len(sections)
    return torch.where(pair < torch.tensor(sections)[axis] * len(sections), axis, 0).int()


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `norm_rope.rms_norm`; the normed rows are fp32."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    return _normed(total.float(), eps) * weight.float(), total


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    axis_of_pair: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As `norm_rope.rope_append`; the queries are fp32."""
    kv_heads = len(slots)
    heads = (qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads)
    q, k, v = qkv.float().split(heads, dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = _normed(q, eps) * q_weight.float(), _normed(k, eps) * k_weight.float()
    angles = _angles(positions, frequencies, axis_of_pair)[:, None]
    stored = slots.T >= 0  # [N, Hkv]
    for pages, rows in ((k_pages, _turned(k, angles)), (v_pages, v)):
        pages.view(-1, pages.shape[-1])[slots.T[stored]] = rows[stored].to(pages.dtype)
    return _turned(q, angles)


def rerotate(
    k_pages: Tensor,
    v_pages: Tensor,
    source: Tensor,
    destination: Tensor,
    delta: Tensor,
    frequencies: Tensor,
) -> None:
    """As `norm_rope.rerotate`."""
    k, v = (pages.view(-1, pages.shape[-1]) for pages in (k_pages, v_pages))
    turned = _turned(k[source].float(), _angles(delta, frequencies, None))
    k[destination], v[destination] = turned.to(k.dtype), v[source]


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _angles(positions: Tensor, frequencies: Tensor, axis_of_pair: Tensor | None) -> Tensor:
    """fp32 [N, d / 2]."""
    if positions.ndim == 1:
        positions = positions[:, None]
    axes = torch.zeros(len(frequencies), dtype=torch.int64) if axis_of_pair is None else axis_of_pair.long()
    return positions.float()[:, axes.to(positions.device)] * frequencies


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pair i of x [..., d] is its channels i and i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
