"""FlashVID's outer part against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.base import VisualItem
from mmserve.pruning.flashvid import FlashVID
from tests.pruning.clips import (
    Row,
    assert_same,
    budget_of,
    clip,
    cosine,
    density_clusters,
    even,
    proportional,
)

Cell = tuple[int, int]  # frame, position


def literal(item: VisualItem, pruner: FlashVID) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    budget = budget_of(item, pruner.keep)
    counts = [math.ceil(Fraction(str(pruner.diverse)) * quota) for quota in even(T, budget)]
    chosen = {(t, n) for t in range(T) for n in diverse(item, t, counts[t])}
    rows: list[Row] = [(t * N + n, x[t, n], 1) for t, n in chosen]
    if len(chosen) == budget:
        return rows
    trees = grow(item, chosen, cuts(item, pruner), pruner.tau, budget)
    means = {root: torch.stack([x[cell] for cell in tree]).mean(dim=0) for root, tree in trees.items()}
    frames = [[root for root in sorted(trees) if root[0] == t] for t in range(T)]
    quotas = proportional([len(roots) for roots in frames], budget - len(chosen))
    for roots, quota in zip(frames, quotas, strict=True):
        values = {t * N + n: means[t, n] for t, n in roots}
        for centre, others in density_clusters(values, quota, pruner.neighbours).items():
            cluster = [centre, *others]
            value = torch.stack([values[root] for root in cluster]).mean(dim=0)
            rows.append((centre, value, sum(len(trees[divmod(root, N)]) for root in cluster)))
    return rows


def diverse(item: VisualItem, t: int, count: int) -> list[int]:
    frame, salient = item.embeddings[t], item.saliency[t]
    left = list(range(len(frame)))
    chosen: list[int] = []
    for _ in range(count):
        # to all other tokens at first, then to those that are chosen
        score = {
            j: min(
                [(1 - cosine(frame[i], frame[j])) * float(salient[j]) for i in chosen or left if i != j],
                default=math.inf,
            )
            for j in left
        }
        chosen.append(max(left, key=lambda j: (score[j], -j)))
        left.remove(chosen[-1])
    return chosen


def cuts(item: VisualItem, pruner: FlashVID) -> set[int]:
    """Frames that begin a segment, but for the first one."""
    means = item.embeddings.mean(dim=1)
    alike = {t: cosine(means[t - 1], means[t]) for t in range(1, len(means))}
    least = sorted(alike, key=lambda t: (alike[t], t))[: pruner.segments - 1]
    return {t for t in alike if alike[t] < pruner.tau_segment} | set(least)


def grow(
    item: VisualItem, chosen: set[Cell], begins: set[int], tau: float, budget: int
) -> dict[Cell, list[Cell]]:
    """The cells of each tree by its root."""
    x = item.embeddings
    T, N, _ = x.shape
    rest = [(t, n) for t in range(T) for n in range(N) if (t, n) not in chosen]
    links = []
    for t, n in rest:
        before = {m: cosine(x[t, n], x[t - 1, m]) for m in range(N) if (t - 1, m) in set(rest)}
        if t in begins or not before:
            continue
        parent = max(before, key=lambda m: (before[m], -m))
        if before[parent] > tau:
            links.append((-before[parent], (t, n), (t - 1, parent)))
    parents = {cell: parent for _, cell, parent in sorted(links)[: T * N - budget]}
    trees: dict[Cell, list[Cell]] = {}
    for cell in rest:
        root = cell
        while root in parents:
            root = parents[root]
        trees.setdefault(root, []).append(cell)
    return trees


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 7),
    tokens=st.integers(1, 10),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
    tau=st.sampled_from([0.2, 0.8]),
    segments=st.sampled_from([1, 3, 8]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, tau: float, segments: int
) -> None:
    item = clip(seed, frames, tokens)
    pruner = FlashVID(keep=keep, tau=tau, tau_segment=0.5, segments=segments)
    assert_same(pruner.reduce(item), literal(item, pruner))


def test_a_tree_follows_what_moves() -> None:
    # one thing moves from left to right over four frames, on ground that every frame shows anew
    ground = torch.eye(16)[:12].view(4, 3, 16)
    x = torch.cat([ground, torch.zeros(4, 1, 16)], dim=1)
    for t in range(4):
        x[t, [t, 3]] = x[t, [3, t]]
        x[t, t, 15] = 1
    item = VisualItem(embeddings=x, saliency=torch.ones(4, 4))
    reduced = FlashVID(keep=13 / 16, diverse=0, tau_segment=-1, segments=1).reduce(item)
    assert reduced.weight.tolist() == [4, *[1] * 12]
    assert reduced.source[0] == 0
    cut = FlashVID(keep=13 / 16, diverse=0, tau_segment=-1, segments=4).reduce(item)
    assert int(cut.weight.max()) == 2  # clustered in its frame


def test_the_most_salient_of_equally_distant_tokens_come_first() -> None:
    item = VisualItem(embeddings=torch.eye(6)[None], saliency=torch.tensor([[0.1, 0.5, 0.3, 0.6, 0.2, 0.4]]))
    assert FlashVID(keep=0.5, diverse=1).reduce(item).source.tolist() == [1, 3, 5]
