"""Random eviction: the baseline every method has to beat.

The draw depends only on what the prompt looks like (orders, which slots are visual, layer, head), so a
request gives the same answer every time and on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar, Literal

import numpy as np

from mmserve.kv.base import LayerView, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomEviction:
    name: ClassVar[str] = "random"
    paper: ClassVar[str] = ""
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = True
    needs_all_layers: ClassVar[bool] = False
    acts_at: ClassVar[Literal["prefill_end"]] = "prefill_end"
    granularity: ClassVar[Literal["head"]] = "head"
    count: ClassVar[Literal["exact"]] = "exact"

    seed: int = 0

    def select(self, view: LayerView) -> Selection:
        visual = view.visual.cpu().numpy()
        order = view.order.cpu().numpy().astype(np.int64)
        content = blake2b(order.tobytes() + visual.tobytes(), digest_size=8).digest()
        text, candidates = np.flatnonzero(~visual), np.flatnonzero(visual)
        kept = []
        for head in range(len(view.keys)):
            draw = np.random.default_rng([self.seed, view.layer, head, int.from_bytes(content, "little")])
            chosen = draw.permutation(candidates)[: view.visual_budget]
            kept.append(np.sort(np.concatenate([text, chosen])))
        return kept
