"""Give tokens that are not kept to the kept ones they resemble most.

Knows nothing about how either was chosen, or what becomes of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assign_by_cosine(heads: Tensor, used: Tensor, tokens: Tensor, loose: Tensor) -> Tensor:
    """Assignment [G, C, M], one where a head takes a token: every loose one goes to its most similar head.

    `heads` [G, C, D] and `tokens` [G, M, D] have unit length. Heads that are not `used` [G, C] take
    nothing, tokens that are not `loose` [G, M] go nowhere; of equally similar heads the first one wins.
    """
    slots = torch.arange(heads.shape[1], device=heads.device)
    similar = (heads @ tokens.mT).masked_fill(~used[..., None], -torch.inf)  # [G, C, M]
    nearest = similar.argmax(dim=1) if len(slots) else loose.to(torch.int64)
    taken = (nearest[:, None, :] == slots[:, None]) & loose[:, None, :] & used[..., None]
    return taken.to(tokens.dtype)
