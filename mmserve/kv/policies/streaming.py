"""StreamingLLM (arXiv 2309.17453): keep the beginning of the prompt and the newest slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmserve.kv.base import KVPolicy, LayerView
from mmserve.pruning.settings import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming(KVPolicy):
    """Visual slots among the first `sink` tokens of the prompt, then the newest ones, in all heads alike."""

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "arXiv:2309.17453"
    granularity: ClassVar[Literal["token"]] = "token"

    sink: int = whole(4, 0, 1 << 16, "how many tokens at the beginning of the prompt stay")

    def scores(self, view: LayerView) -> Tensor:
        order = view.order[view.visual]
        scores = torch.where(order < self.sink, torch.inf, order.float())
        return scores.expand(len(view.keys), -1)
