"""How much attention each token receives in one layer of a vision tower."""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.saliency import naive


def saliency(q: Tensor, k: Tensor, begins: Tensor, *, scale: float, max_tokens: int) -> Tensor:
    """Mean attention, over heads and the rows of its picture, that each token receives: fp32 [N].

    q and k [N, H, d] are those of pictures one after another, begins int32 [pictures + 1] says where, on the
    device; no picture has more than max_tokens. Every token sees its whole picture and nothing else.
    """
    if backend_for(q.device) == "naive":
        return naive.saliency(q, k, begins, scale=scale)
    # triton is imported only where it runs
    from mmserve.kernels.saliency import triton

    return triton.saliency(q, k, begins, scale=scale, max_tokens=max_tokens)
