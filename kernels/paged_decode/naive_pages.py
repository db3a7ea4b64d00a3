"""Oracle of the GPU kernel: fp32 torch over page tables, one KV head of one sequence at a time, any device.

Also says how quantized pages are read. Knows nothing about how they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PageScales:
    """How the integers (or fp8 numbers) n of quantized pages are read: value = scale * n + zero, all fp32.

    Values have a scale per slot; keys have one per slot, or one per page and channel as in KIVI. No zeros
    means symmetric. int4 pages are uint8 [pages, page_size, d / 2]: n = 0 to 15 of channel c in the low
    half of byte c, of channel c + d / 2 in its high half.
    """

    key_axis: Literal["slot", "channel"]
    k_scale: Tensor  # [pages, page_size], or [pages, d] by channel
    v_scale: Tensor  # [pages, page_size]
    k_zero: Tensor | None = None
    v_zero: Tensor | None = None


class Decoded(NamedTuple):
    """Attention of one row per sequence; a head without slots is 0 with LSE -inf."""

    out: Tensor  # [B, Hq, d]
    lse: Tensor  # fp32 [B, Hq], natural logarithm
    mass: Tensor | None  # fp32 [B, Hkv, max_pages * page_size]: weights per slot, summed over the group


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    scales: PageScales | None = None,
    mass: bool = False,
) -> Decoded:
    """As `triton.paged_decode`, but the output is fp32."""
    batch, q_heads, d = q.shape
    kv_heads, max_pages = tables.shape[1:]
    page_size = k_pages.shape[1]
    grouped = q.float().view(batch, kv_heads, -1, d)
    out = torch.zeros_like(grouped)
    lse = torch.full(grouped.shape[:3], -torch.inf, device=q.device)
    weights = torch.zeros(batch, kv_heads, max_pages * page_size, device=q.device)
    for sequence in range(batch):
        for head in range(kv_heads):
            length = int(lengths[sequence, head])
            pages = tables[sequence, head, : -(-length // page_size)].long()
            k, v = read_pages(k_pages, v_pages, pages, scales)
            scores = grouped[sequence, head] @ k[:length].T * scale
            lse[sequence, head] = torch.logsumexp(scores, -1)
            rows = torch.softmax(scores, -1)
            out[sequence, head] = rows @ v[:length]
            weights[sequence, head, :length] = rows.sum(0)
    return Decoded(out.view(q.shape), lse.view(batch, q_heads), weights if mass else None)


def read_pages(
    k_pages: Tensor, v_pages: Tensor, pages: Tensor, scales: PageScales | None
) -> tuple[Tensor, Tensor]:
    """K and V [slots, d] of these pages [n], one after another, fp32."""
    k, v = (_numbers(kind[pages]) for kind in (k_pages, v_pages))
    if scales is not None:
        k_scale, v_scale = scales.k_scale[pages], scales.v_scale[pages]
        k_zero, v_zero = (
            torch.zeros_like(found) if zero is None else zero[pages]
            for zero, found in ((scales.k_zero, k_scale), (scales.v_zero, v_scale))
        )
        at = -1 if scales.key_axis == "slot" else -2
        k = k * k_scale.unsqueeze(at) + k_zero.unsqueeze(at)
        v = v * v_scale.unsqueeze(-1) + v_zero.unsqueeze(-1)
    return k.flatten(0, 1), v.flatten(0, 1)


def _numbers(pages: Tensor) -> Tensor:
    """What is stored, unscaled."""
    if pages.dtype is torch.uint8:
        pages = torch.cat([pages & 15, pages >> 4], dim=-1)
    return pages.float()
