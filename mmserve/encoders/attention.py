"""Attention of a vision tower: our compiled kernel for bf16 on a CPU, torch's for everything else.

torch's own kernel multiplies bf16 on CPUs at half that speed. Registered with transformers under `NAME`.
Knows nothing about towers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmserve.kernels.prefill_attention import cpu as native

NAME = "mmserve_tower"


def tower_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Outputs [B, N, H, d] of q, k and v [B, H, N, d]; every token sees its whole picture."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, N, H, d]
    if not (native.is_available(q, k) and all(tensor.is_contiguous() for tensor in (q, k, v))):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    assert attention_mask is None, "a picture has no padding"
    pictures, tokens, heads, _ = q.shape
    first = torch.arange(pictures)[:, None] * tokens * heads + torch.arange(heads)
    out = native.prefill_attention(
        q,
        k,
        v,
        first.flatten(),
        torch.full((pictures * heads,), tokens, dtype=torch.int32),
        torch.arange(pictures * heads + 1),
        scale=scaling,
        is_causal=False,
        slot_step=heads,
    )
    return out, None


AttentionInterface.register(NAME, tower_attention)
