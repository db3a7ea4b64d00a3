"""PruMerge and its plus against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.errors import BadRequest
from mmserve.pruning.base import VisualItem, make_pruner
from mmserve.pruning.prumerge import PruMerge
from tests.pruning.clips import Row, assert_same, clip, cosine


def literal(item: VisualItem, keep: float, plus: bool, neighbours: int) -> list[Row]:
    x, a = item.embeddings, item.saliency.double()
    T, N, _ = x.shape
    budget = max(1, math.floor(Fraction(str(keep)) * T * N))
    outliers = []
    for t in range(T):
        low, high = np.quantile(a[t].numpy(), [0.25, 0.75])
        top = max(range(N), key=lambda n: (float(a[t, n]), -n))
        outliers += [(t, n) for n in range(N) if a[t, n] > high + 1.5 * (high - low) or n == top]
    chosen = sorted(outliers, key=lambda cell: (-float(a[cell]), cell))[:budget]
    if plus:
        rest = [(t, n) for t in range(T) for n in range(N) if (t, n) not in chosen]
        missing = budget - len(chosen)
        chosen += [rest[(2 * i + 1) * len(rest) // (2 * missing)] for i in range(missing)]
    taken = {}
    for t, p in chosen:
        loose = [n for n in range(N) if (t, n) not in chosen]
        near = sorted(loose, key=lambda n: -cosine(x[t, n], x[t, p]))[:neighbours]
        taken[t, p] = [n for n in near if a[t, n] > 0]
    rows: list[Row] = []
    for (t, p), near in taken.items():
        total = float(a[t, [p, *near]].sum())
        merged = (a[t, [p, *near], None] * x[t, [p, *near]]).sum(dim=0) / total if near else x[t, p]
        weight = sum((Fraction(1, sum(n in taken[cell] for cell in taken if cell[0] == t)) for n in near), 1)
        rows.append((t * N + p, merged, weight))
    return rows


def skewed(seed: int, frames: int, tokens: int) -> VisualItem:
    """Saliency with outliers and zeros."""
    item = clip(seed, frames, tokens)
    return VisualItem(embeddings=item.embeddings, saliency=item.saliency.double() ** 6)


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 8),
    tokens=st.integers(1, 16),
    keep=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.9]),
    plus=st.booleans(),
    neighbours=st.sampled_from([1, 3, 32]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, plus: bool, neighbours: int
) -> None:
    item = skewed(seed, frames, tokens)
    pruner = PruMerge(keep=keep, plus=plus, neighbours=neighbours)
    if pruner.plan(frames, tokens) < frames * tokens:
        assert_same(pruner.reduce(item), literal(item, keep, plus, neighbours))


def test_a_picture_by_hand() -> None:
    # quartiles 1 and 1: both that are above 1 stand out; each has its nearest, and 2 is near to both
    x = torch.tensor([[4, 0], [0, 4], [3, 3], [1, 0.1], [0.1, 1], [-1, -1], [-1, -2], [-2, -1], [-1, -3]])
    saliency = torch.tensor([[3.0, 2, 1, 1, 1, 1, 1, 1, 1]])
    item = VisualItem(embeddings=x[None], saliency=saliency, modality="image")
    reduced = PruMerge(keep=0.9, neighbours=2).reduce(item)
    assert reduced.source.tolist() == [0, 1]
    assert reduced.weight.tolist() == [2.5, 2.5]
    expected = torch.stack([3 * x[0] + x[2] + x[3], 2 * x[1] + x[2] + x[4]]) / torch.tensor([[5], [4]])
    torch.testing.assert_close(reduced.embeddings, expected)


def test_the_bound_holds_where_more_stand_out() -> None:
    saliency = torch.tensor([[0.0] * 12 + [5, 7, 6, 7]])
    item = VisualItem(embeddings=torch.randn(1, 16, 4), saliency=saliency, modality="image")
    assert PruMerge(keep=0.125).reduce(item).source.tolist() == [13, 15]
    assert PruMerge(keep=0.1875).reduce(item).source.tolist() == [13, 14, 15]


def test_a_frame_without_outliers_keeps_its_most_salient_token() -> None:
    item = VisualItem(embeddings=torch.randn(3, 8, 4), saliency=torch.ones(3, 8))
    assert PruMerge(keep=0.5).reduce(item).source.tolist() == [0, 8, 16]


@given(frames=st.integers(1, 20), tokens=st.integers(1, 20), keep=st.floats(1e-3, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_plus_fills_the_bound(frames: int, tokens: int, keep: float, seed: int) -> None:
    pruner = PruMerge(keep=keep, plus=True)
    assert len(pruner.reduce(skewed(seed, frames, tokens)).source) == pruner.plan(frames, tokens)


def test_settings_are_checked() -> None:
    with pytest.raises(BadRequest, match="Expected plus to be true or false, but got 2"):
        make_pruner("prumerge", 0.5, plus=2)
    assert make_pruner("prumerge", 0.5, plus=True) == PruMerge(keep=0.5, plus=True)
