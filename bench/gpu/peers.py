"""torch's own attention on contiguous K and V: SDPA by backend, and FlexAttention where it compiles.

Knows nothing about our kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[], Tensor]
FLEX_BLOCK = 128


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> dict[str, Attend]:
    """By name; q [B, Hq, n, d], k and v [B, Hkv, S, d]. A CPU has only its default."""
    if q.device.type != "cuda":
        backends = {"math": SDPBackend.MATH}
    else:
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def made(backend: SDPBackend) -> Attend:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

        return attend

    return {name: made(backend) for name, backend in backends.items()}


def flex(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attend]:
    """Causal FlexAttention, which is of use compiled only."""
    if q.device.type != "cuda":
        return {}
    mask = causal_blocks(q.shape[2], q.device)
    # each length compiles anew, and after a few torch would fall back to whole matrices of scores
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend() -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        return out

    return {"flex": attend}


def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """The blocks of a causal mask, without ever making the mask; `length` is a multiple of a block."""
    assert length % FLEX_BLOCK == 0, "whole blocks"
    count = length // FLEX_BLOCK
    blocks = torch.arange(count, dtype=torch.int32, device=device)
    diagonal = torch.zeros(count, count, dtype=torch.int32, device=device)
    diagonal[:, 0] = blocks
    return BlockMask.from_kv_blocks(
        torch.ones_like(blocks)[None, None],
        diagonal[None, None],
        blocks[None, None],
        blocks.expand(count, count).contiguous()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_causal,
        seq_lengths=(length, length),
    )


def _causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key
