"""Attention of a vision tower in bf16 on a CPU: one picture's heads as two products and a softmax.

torch's flash kernel for CPUs multiplies bf16 at about half that speed. Registered with transformers
under `NAME`; other dtypes and devices go to torch's kernel. Knows nothing about towers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
    if query.dtype is not torch.bfloat16 or query.device.type != "cpu":
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    assert attention_mask is None, "a picture has no padding"
    out = query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3])
    for picture, q, k, v in zip(out, query, key, value, strict=True):
        scores = torch.bmm(q * scaling, k.transpose(1, 2))
        torch.bmm(torch.softmax(scores, -1, out=scores), v, out=picture.transpose(0, 1))
    return out, None


AttentionInterface.register(NAME, tower_attention)
