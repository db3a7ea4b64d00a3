"""Locret (arXiv 2410.01805): trained retaining heads score each slot from its query, key and value.

Two linear maps per layer without biases, as in the authors' checkpoints (`...self_attn.fc1.weight`), on
queries, keys and values before rotation. The paper evicts while it prefills, chunk by chunk; here what leaves
leaves at the end, so nothing is scored by what others have lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.kv.allocation import with_recent
from mmserve.kv.base import KVPolicy, LayerView, Rows
from mmserve.kv.heads import head_of, read_heads
from mmserve.kv.observers import RowScores, unrotated
from mmserve.pruning.settings import setting, whole

NAMES = r"(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\.fc(?P<step>[12])\.(?P<kind>weight)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Locret(KVPolicy):
    """fc2(silu(fc1([q, k, v]))), top slots per KV head."""

    name: ClassVar[str] = "locret"
    paper: ClassVar[str] = "arXiv:2410.01805"
    trained_weights: ClassVar[bool] = True

    weights: str = setting("", "a safetensors file of heads")
    window: int = whole(100, 0, 1 << 16, "slots at the end of the prompt that always stay")

    def observer(self) -> RowScores:
        return RowScores(self._score)

    def _score(self, rows: Rows) -> Tensor:
        keys, values = (part[:, -len(rows.order) :].transpose(0, 1) for part in rows.read())
        query, key = (unrotated(part, rows.position, rows.frequencies) for part in (rows.queries, keys))
        x = torch.cat([part.float().flatten(1) for part in (query, key, values)], dim=1)
        heads = read_heads(self.name, self.weights, NAMES, x.device)
        first, second = head_of(self.name, heads, rows.layer, x.shape[1], keys.shape[1])
        return functional.linear(functional.silu(functional.linear(x, first.weight)), second.weight).T

    def scores(self, view: LayerView) -> Tensor:
        slots = view.visual_slots
        recent = int((slots >= len(view.order) - self.window).sum())
        return with_recent(view.sums["scores"][:, slots], recent)
