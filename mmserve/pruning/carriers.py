"""VideoScan's semantic carriers (arXiv 2503.09387): who sees whom in a prompt, and what remains of it.

The carrier of a video frame stands in the slot of the frame's last token, at that token's position; its
embedding is the mean of all the frame's tokens. A frame sees the text before it, itself and the carriers
of earlier frames; text sees text and carriers. So the keys and values of a frame's other tokens can be
dropped when the frame is over. Tokens of images count as text, positions are those of the uncompressed
prompt. This is the rule that checkpoints are trained with. Knows nothing about models or caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.errors import BadRequest
from mmserve.pruning.base import Modality, Reduced, VisualItem, check_keep
from mmserve.pruning.settings import check_values, setting, whole

FOREVER = torch.iinfo(torch.int32).max


def carrier_slots(frame: Tensor) -> Tensor:
    """Which tokens are carriers, bool [S]. `frame` holds each token's frame number, -1 for text."""
    following = torch.cat([frame[1:], frame.new_full((1,), -1)])
    return (frame >= 0) & (frame != following)


def remaining(frame: Tensor) -> Tensor:
    """Which tokens stay in the cache at the end of prefill, bool [S]: text and carriers."""
    return (frame < 0) | carrier_slots(frame)


def seen_until(frame: Tensor) -> Tensor:
    """The first token that does not see each token although it comes later, int64 [S].

    That is the one after its frame, and `FOREVER` for what remains.
    """
    carriers = carrier_slots(frame).nonzero()[:, 0]
    token = torch.arange(len(frame), device=frame.device)
    stays = remaining(frame)
    own = torch.searchsorted(carriers, token[~stays])
    return torch.full_like(token, FOREVER).masked_scatter(~stays, carriers[own] + 1)


def carrier_mask(frame: Tensor) -> Tensor:
    """Which token (row) sees which (column), bool [S, S]."""
    token = torch.arange(len(frame), device=frame.device)[:, None]
    return (token >= token.T) & (token < seen_until(frame))


def with_carriers(frames: Tensor) -> Tensor:
    """Embeddings [T, N, D] of a video with the last token of each frame replaced by the frame's mean."""
    return torch.cat([frames[:, :-1], frames.mean(1, keepdim=True)], 1)


class CarrierBank:
    """The carriers that stay where there is room for `size`: O(size) for every frame.

    With one more, of the two neighbours that are most alike the older one leaves.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._names: list[int] = []
        self._units: list[Tensor] = []
        self._alike: list[float] = []  # cosine of each carrier and the next one

    def add(self, name: int, embedding: Tensor) -> int | None:
        """Take the carrier [D] of a frame; which one leaves for it."""
        self._names.append(name)
        self._units.append(functional.normalize(embedding.float(), dim=0))
        count = len(self._names)
        if count > 1:
            self._alike.append(self._cosine(count - 2, count - 1))
        if count <= self._size:
            return None
        leaving = max(range(count - 1), key=self._alike.__getitem__)
        if leaving:
            self._alike[leaving - 1] = self._cosine(leaving - 1, leaving + 1)
        del self._alike[leaving], self._units[leaving]
        return self._names.pop(leaving)

    def _cosine(self, one: int, other: int) -> float:
        return float(self._units[one] @ self._units[other])


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticCarriers:
    """All tokens of a video, carriers among them. What of them stays in the cache is decided in prefill.

    With `memory` at most so many carriers of a prompt stay; see `CarrierBank`.
    """

    name: ClassVar[str] = "carriers"
    paper: ClassVar[str] = "arXiv:2503.09387"
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = False
    acts_at: ClassVar[Literal["prefill"]] = "prefill"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = True
    modalities: ClassVar[tuple[Modality, ...]] = ("video",)

    keep: float = setting(1.0, "one token of every frame stays: nothing else can be asked for")
    memory: int | None = whole(None, 1, 65536, "the most frames of a prompt whose carriers stay; none: all")

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep != 1:
            raise BadRequest(
                "Expected no keep with prune carriers, which keeps one token per frame, "
                f"but got {self.keep:g}"
            )
        check_values(self)

    def plan(self, frames: int, tokens: int) -> int:
        return frames * tokens

    def lasting(self, frames: int) -> int:
        """At most how many tokens of so many frames stay in the cache."""
        return frames if self.memory is None else min(frames, self.memory)

    def reduce(self, item: VisualItem) -> Reduced:
        embeddings = item.embeddings if item.modality == "image" else with_carriers(item.embeddings)
        total = item.saliency.numel()
        device = embeddings.device
        weight = torch.ones(item.saliency.shape, dtype=torch.float32, device=device)
        return Reduced(
            embeddings=embeddings.flatten(0, 1),
            source=torch.arange(total, device=device),
            weight=weight.flatten(),
        )
