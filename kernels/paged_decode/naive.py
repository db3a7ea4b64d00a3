"""Oracle of the CPU kernel: fp32, one KV head of one sequence at a time, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    run_first: Tensor,
    run_length: Tensor,
    run_begin: Tensor,
    *,
    scale: float,
) -> Tensor:
    """As `cpu.paged_decode`, but the output [B, Hq, d] is fp32."""
    heads = len(run_begin) - 1
    grouped = q.float().reshape(heads, -1, q.shape[-1])  # [B * Hkv, group, d]
    out = torch.empty_like(grouped)
    begins, firsts, lengths = run_begin.tolist(), run_first.tolist(), run_length.tolist()
    for head in range(heads):
        runs = range(begins[head], begins[head + 1])
        slots = torch.cat([torch.arange(firsts[run], firsts[run] + lengths[run]) for run in runs])
        slots = slots.to(k.device)
        weights = torch.softmax(grouped[head] @ k[slots].float().T * scale, dim=-1)
        out[head] = weights @ v[slots].float()
    return out.view(q.shape)
