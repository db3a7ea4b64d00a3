"""Scores and choices of slots computed one number at a time, from `SCENE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mmserve.kv.base import KVPolicy
from tests.kv.scene import GROUP, KV_HEADS, LAYERS, Scene

Scores = list[list[list[float]]]  # by layer, KV head and visual slot

SCENE = Scene()
SLOTS = range(SCENE.before, SCENE.before + SCENE.visual)
QUESTION = range(SCENE.before + SCENE.visual, SCENE.rows)
HEADS = range(KV_HEADS)


def best(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the largest, ties to the lower one, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def group(head: int) -> range:
    return range(head * GROUP, (head + 1) * GROUP)


def of_rows(rows: Sequence[int], layer: int, head: int) -> list[float]:
    """Attention of rows to every visual slot: a sum over rows and a mean over the heads of a group."""
    paid = [SCENE.attention(layer, one, row) for one in group(head) for row in rows]
    return [sum(row[slot] for row in paid) / GROUP for slot in SLOTS]


def table(score: Callable[[int, int], list[float]]) -> Scores:
    return [[score(layer, head) for head in HEADS] for layer in range(LAYERS)]


def neighbours(scores: Sequence[float], pool: int, pooling: str = "mean") -> list[float]:
    half = pool // 2
    around = [scores[max(i - half, 0) : i + half + 1] for i in range(len(scores))]
    return [max(near) if pooling == "max" else sum(near) / pool for near in around]


def windowed(window: int, pool: int, pooling: str = "mean") -> Scores:
    """SnapKV as the paper writes it. The largest of neighbours is taken for every head by itself."""
    rows = list(QUESTION)[-window:]

    def score(layer: int, head: int) -> list[float]:
        heads = []
        for one in group(head):
            paid = [SCENE.attention(layer, one, row) for row in rows]
            mean = [sum(row[slot] for row in paid) / len(rows) for slot in SLOTS]
            heads.append(neighbours(mean, pool, pooling))
        return [sum(column) / GROUP for column in zip(*heads, strict=True)]

    return table(score)


def check(policy: KVPolicy, slots: int, expected: Sequence[Sequence[Sequence[int]]]) -> None:
    found = [[head.tolist() for head in layer] for layer in SCENE.chosen(policy, slots)]
    assert found == [[list(head) for head in layer] for layer in expected]


def per_head(scores: Scores, counts: Sequence[int]) -> list[list[list[int]]]:
    return [[best(head, count) for head in layer] for layer, count in zip(scores, counts, strict=True)]


def with_recent(scores: Scores, counts: Sequence[int]) -> Scores:
    return [
        [[*head[: len(head) - count], *[math.inf] * count] for head in layer]
        for layer, count in zip(scores, counts, strict=True)
    ]


def flat_best(scores: Scores, count: int) -> list[list[list[int]]]:
    """The best of all layers and heads together."""
    every = [
        (-value, layer, head, i)
        for layer, heads in enumerate(scores)
        for head, values in enumerate(heads)
        for i, value in enumerate(values)
    ]
    kept = {place[1:] for place in sorted(every)[:count]}
    return [
        [[i for i in range(SCENE.visual) if (layer, head, i) in kept] for head in HEADS]
        for layer in range(len(scores))
    ]


def ada(scores: Scores, slots: int, floor: float) -> list[list[list[int]]]:
    safe = int(floor * slots + 1e-6)
    chosen = []
    for layer in scores:
        sure = [
            [math.inf if i in best(head, safe) else value for i, value in enumerate(head)] for head in layer
        ]
        chosen += flat_best([sure], slots * KV_HEADS)
    return chosen
