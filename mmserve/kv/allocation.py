"""How a budget of visual slots is shared out over the heads and layers of a sequence.

Scores are fp32 [kv_heads, visual slots] of each layer; the larger stay, ties go to the earlier slot. Knows
nothing about what a score means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# per KV head of a layer: ascending indices of its visual slots that stay
Selection = list[NDArray[np.int64]]


def top_per_head(scores: Sequence[Tensor], slots: Sequence[int]) -> list[Selection]:
    """Every head of a layer keeps as many."""
    kept = []
    for layer, count in zip(scores, slots, strict=True):
        best = ranked(layer)[:, :count].sort(-1).values.cpu().numpy()
        kept.append([row.astype(np.int64) for row in best])
    return kept


def top_by_head(scores: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[Selection]:
    """Every head keeps its own number."""
    kept = []
    for layer, heads in zip(scores, counts, strict=True):
        rows = zip(ranked(layer), heads, strict=True)
        kept.append([row[:count].sort().values.cpu().numpy().astype(np.int64) for row, count in rows])
    return kept


def over_heads(scores: Sequence[Tensor], slots: Sequence[int], floor: float) -> list[Selection]:
    """AdaKV: the best of a layer in any head, after a share `floor` of what each would get alike."""
    kept = []
    for layer, count in zip(scores, slots, strict=True):
        safe = ranked(layer)[:, : int(floor * count + 1e-6)]
        kept.append(_best(layer.scatter(1, safe, torch.inf), count * len(layer)))
    return kept


def whole_model(scores: Sequence[Tensor], slots: Sequence[int]) -> list[Selection]:
    """KVzip: the best of all layers and heads together."""
    flat = torch.cat([layer.flatten() for layer in scores])
    total = sum(count * len(layer) for layer, count in zip(scores, slots, strict=True))
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[ranked(flat)[:total]] = True
    parts = chosen.split([layer.numel() for layer in scores])
    return [_selection(part.view_as(layer)) for part, layer in zip(parts, scores, strict=True)]


def by_weight(
    scores: Sequence[Tensor], slots: Sequence[int], weights: Sequence[float], *, least: float = 0.0
) -> list[Selection]:
    """Layers share the budget of all by weight, heads of a layer alike."""
    caps = [layer.shape[1] for layer in scores]
    return top_per_head(scores, shared(sum(slots), weights, caps, least=least))


def shared(total: int, weights: Sequence[float], caps: Sequence[int], *, least: float = 0.0) -> list[int]:
    """`total` cut into whole parts by weight: none above its cap, none below a share `least` of it.

    What a cap leaves over goes to the others by weight; with all weights 0 they share alike.
    """
    cap, wanted = np.asarray(caps, np.float64), np.asarray(weights, np.float64)
    goal = min(total, int(cap.sum()))
    floors = np.minimum(np.floor(least * cap), cap)
    if floors.sum() > goal:
        floors = np.zeros_like(cap)
    if not wanted.any():
        wanted = np.ones_like(cap)
    wanted = np.maximum(wanted, 1e-9 * wanted.max())
    # parts rise with the level of the water: find the one at which they sum to the goal
    low, high = 0.0, 1.0
    while np.clip(wanted * high, floors, cap).sum() < goal:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(wanted * middle, floors, cap).sum() < goal else (low, middle)
    return rounded(np.clip(wanted * high, floors, cap), goal, caps)


def rounded(exact: NDArray[np.float64], total: int, caps: Sequence[int]) -> list[int]:
    """Whole parts that sum to `total`, which the exact ones do: the largest remainders are rounded up."""
    parts = np.floor(exact + 1e-6).astype(np.int64)
    # between equal ones the earlier layer comes first
    for part in np.argsort(parts - exact, kind="stable"):
        if parts.sum() < total and parts[part] < caps[part]:
            parts[part] += 1
    return [int(part) for part in parts]


def with_recent(scores: Tensor, count: int) -> Tensor:
    """The last `count` slots of every head come before all others."""
    if count == 0:
        return scores
    recent = scores.clone()
    recent[:, -count:] = torch.inf
    return recent


def ranked(scores: Tensor) -> Tensor:
    """Indices by descending score; ties go to the lower index."""
    # a stable descending sort resolves ties to the lower index
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _best(scores: Tensor, count: int) -> Selection:
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[ranked(scores.flatten())[:count]] = True
    return _selection(chosen.view_as(scores))


def _selection(chosen: Tensor) -> Selection:
    return [np.flatnonzero(row) for row in chosen.cpu().numpy()]
