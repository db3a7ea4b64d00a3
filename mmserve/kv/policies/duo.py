"""DuoAttention (arXiv 2410.10819): retrieval heads keep everything, the others the beginning and the end.

Which heads are which is a profile that was trained for a model. Knows nothing about how.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.kv.allocation import Selection, top_by_head
from mmserve.kv.base import Budgeted, KVPolicy, LayerView
from mmserve.pruning.settings import setting, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DuoAttention(KVPolicy):
    """As many heads keep everything as the budget allows, those with the largest gates.

    A layer's weight is how many visual slots its other heads keep.
    """

    name: ClassVar[str] = "duo"
    paper: ClassVar[str] = "arXiv:2410.10819"
    needs_all_layers: ClassVar[bool] = True
    count: ClassVar[Literal["bound"]] = "bound"
    trained_weights: ClassVar[bool] = True

    weights: str = setting("", 'the profile: JSON, {"gates": [[one of every KV head] of every layer]}')
    sink: int = whole(64, 0, 1 << 16, "slots at the beginning of the prompt that every head keeps")
    recent: int = whole(256, 0, 1 << 16, "slots at the end of the prompt that every head keeps")

    def scores(self, view: LayerView) -> Tensor:
        slots = view.visual_slots
        scores = torch.where(slots < self.sink, torch.inf, slots.float())
        return scores.expand(len(view.keys), -1)

    def weight(self, view: LayerView) -> float:
        slots = view.visual_slots
        return int(((slots < self.sink) | (slots >= len(view.order) - self.recent)).sum())

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        gates = read_gates(self.weights)
        expected = (len(scores), len(scores[0]))
        if gates.shape != expected:
            raise BadRequest(f"Expected gates of shape {expected} for kv duo, but got {gates.shape}")
        most = np.array([layer.shape[1] for layer in scores])
        streaming = np.minimum(np.array(budget.weights, np.int64), budget.slots)
        counts = np.repeat(streaming[:, None], expected[1], axis=1)
        left = (sum(budget.slots) - int(streaming.sum())) * expected[1]
        for place in np.argsort(-gates, axis=None, kind="stable").tolist():
            layer, head = divmod(place, expected[1])
            left -= int(most[layer] - counts[layer, head])
            if left < 0:
                break
            counts[layer, head] = most[layer]
        return top_by_head(scores, counts.tolist())


@lru_cache(maxsize=4)
def read_gates(file: str) -> NDArray[np.float64]:
    """The profile in a file, [layers, kv_heads]."""
    if not file:
        raise BadRequest("Expected kv_options.weights with kv duo: the profile of a model's heads")
    try:
        gates = np.array(json.loads(Path(file).read_text("utf-8"))["gates"], np.float64)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadRequest("Expected a profile in kv_options.weights, but it cannot be read") from error
    if gates.ndim != 2 or not np.isfinite(gates).all():
        raise BadRequest("Expected gates of every KV head of every layer in kv_options.weights")
    return gates
