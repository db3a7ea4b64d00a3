"""Random eviction: the baseline every method has to beat.

The draw depends only on what the prompt looks like (orders, which slots are visual, layer, head), so a
request gives the same answer every time and on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmserve.kv.base import KVPolicy, LayerView
from mmserve.pruning.settings import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomEviction(KVPolicy):
    name: ClassVar[str] = "random"

    seed: int = whole(0, 0, 2**31, "another seed, another draw")

    def scores(self, view: LayerView) -> Tensor:
        """Drawn slots score by how early they were drawn."""
        visual = view.visual.cpu().numpy()
        order = view.order.cpu().numpy().astype(np.int64)
        content = blake2b(order.tobytes() + visual.tobytes(), digest_size=8).digest()
        count = int(visual.sum())
        scores = np.empty((len(view.keys), count), np.float32)
        for head in range(len(view.keys)):
            draw = np.random.default_rng([self.seed, view.layer, head, int.from_bytes(content, "little")])
            scores[head, draw.permutation(count)] = -np.arange(count)
        return torch.from_numpy(scores)
