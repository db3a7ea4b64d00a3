"""PruneVid's part before the language model against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning import density
from mmserve.pruning.base import VisualItem
from mmserve.pruning.prunevid import PruneVid
from tests.pruning.clips import (
    Row,
    assert_same,
    budget_of,
    clip,
    cosine,
    density_clusters,
    proportional,
)

Span = tuple[int, int]


def literal(item: VisualItem, pruner: PruneVid) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    budget = budget_of(item, pruner.keep)
    if budget == T * N:
        return [(t * N + n, x[t, n], 1) for t in range(T) for n in range(N)]
    spans = segment(item, pruner)
    fixed = static(item, spans, pruner.tau, T * N - budget)
    groups = [{a * N + n: x[a:b, n].mean(dim=0) for n in range(N) if ((a, b), n) in fixed} for a, b in spans]
    weights = {a * N + n: b - a for (a, b), n in fixed}
    for a, b in spans:
        for t in range(a, b):
            moving = {t * N + n: x[t, n] for n in range(N) if ((a, b), n) not in fixed}
            weights |= dict.fromkeys(moving, 1)
            groups.append(moving)
    rows: list[Row] = []
    for group, quota in zip(groups, proportional([len(group) for group in groups], budget), strict=True):
        for centre, others in density_clusters(group, quota, pruner.neighbours).items():
            cluster = [centre, *others]
            value = torch.stack([group[source] for source in cluster]).mean(dim=0)
            rows.append((centre, value, sum(weights[source] for source in cluster)))
    return rows


def segment(item: VisualItem, pruner: PruneVid) -> list[Span]:
    means = item.embeddings.mean(dim=1)
    frames = dict(enumerate(means))
    centres = sorted(
        density_clusters(
            frames, max(1, math.floor(Fraction(str(pruner.segments)) * len(means))), pruner.neighbours
        )
    )
    starts = [0]
    for left, right in pairwise(centres):
        cost = {
            start: sum(float((means[t] - means[left]).square().sum()) for t in range(left + 1, start))
            + sum(float((means[t] - means[right]).square().sum()) for t in range(start, right))
            for start in range(left + 1, right + 1)
        }
        starts.append(min(cost, key=lambda start: (cost[start], start)))
    return list(pairwise([*starts, len(means)]))


def static(item: VisualItem, spans: list[Span], tau: float, limit: int) -> set[tuple[Span, int]]:
    alike = {}
    for a, b in spans:
        for n in range(item.embeddings.shape[1]):
            pairs = list(combinations(item.embeddings[a:b, n], 2))
            if pairs:
                alike[(a, b), n] = sum(cosine(*pair) for pair in pairs) / len(pairs)
    fixed = set()
    for span, n in sorted(alike, key=lambda found: (-alike[found], found)):
        limit -= span[1] - span[0] - 1
        if limit < 0 or alike[span, n] <= tau:
            break
        fixed.add((span, n))
    return fixed


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 12),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
    tau=st.sampled_from([0.5, 0.8]),
    segments=st.sampled_from([0.1, 0.25, 1]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, tau: float, segments: float
) -> None:
    item = clip(seed, frames, tokens)
    pruner = PruneVid(keep=keep, tau=tau, segments=segments)
    assert_same(pruner.reduce(item), literal(item, pruner))


def test_what_stands_still_is_one_token_per_segment() -> None:
    rng = torch.Generator().manual_seed(0)
    scenes = torch.randn(2, 10, 16, generator=rng)
    x = scenes.repeat_interleave(4, dim=0)  # four frames of each of two scenes
    x[:, 7:] = torch.randn(8, 3, 16, generator=rng)
    item = VisualItem(embeddings=x, saliency=torch.zeros(8, 10))
    reduced = PruneVid(keep=38 / 80).reduce(item)
    assert reduced.weight.tolist() == [*[4] * 7, *[1] * 12, *[4] * 7, *[1] * 12]
    torch.testing.assert_close(reduced.embeddings[:7], scenes[0, :7])
    # of the static ones only as many as leave the budget
    assert sorted(PruneVid(keep=74 / 80).reduce(item).weight.tolist())[-3:] == [1, 4, 4]


def test_tables_of_distances_may_be_built_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    item, pruner = clip(4, 12, 14), PruneVid(keep=0.3)
    at_once = pruner.reduce(item)
    for entries in (1, 400):
        monkeypatch.setattr(density, "_MAX_DISTANCES", entries)
        in_parts = pruner.reduce(item)
        assert torch.equal(in_parts.source, at_once.source)
        assert torch.equal(in_parts.weight, at_once.weight)
        torch.testing.assert_close(in_parts.embeddings, at_once.embeddings)
