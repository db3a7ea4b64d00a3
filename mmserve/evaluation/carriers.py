"""VideoScan's semantic carriers at uncompressed positions: who sees whom, and what remains.

The carrier of a video frame stands in the slot of the frame's last token, at that token's position; its
embedding is the mean of all the frame's tokens. A frame sees the text before it, itself and the carriers
of earlier frames; text sees text and carriers. So after prefill the keys and values of all other visual
tokens can be dropped. Tokens of images count as text. Knows nothing about models.
"""

from __future__ import annotations

import torch
from torch import Tensor


def carrier_slots(frame: Tensor) -> Tensor:
    """Which tokens are carriers, bool [S]. `frame` holds each token's frame number, -1 for text."""
    following = torch.cat([frame[1:], frame.new_full((1,), -1)])
    return (frame >= 0) & (frame != following)


def remaining(frame: Tensor) -> Tensor:
    """Which tokens stay in the cache at the end of prefill, bool [S]: text and carriers."""
    return (frame < 0) | carrier_slots(frame)


def carrier_mask(frame: Tensor) -> Tensor:
    """Which token (row) sees which (column), bool [S, S]."""
    causal = torch.ones(len(frame), len(frame), dtype=torch.bool, device=frame.device).tril()
    return causal & (remaining(frame)[None, :] | (frame[:, None] == frame[None, :]))


def with_carriers(frames: Tensor) -> Tensor:
    """Embeddings [T, N, D] of a video with the last token of each frame replaced by the frame's mean."""
    return torch.cat([frames[:, :-1], frames.mean(1, keepdim=True)], 1)
