"""TimeChat-Online's token drop against its definition."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.base import VisualItem
from mmserve.pruning.timechat import TimeChat
from tests.pruning.clips import Row, assert_same, budget_of, clip, cosine


def literal(item: VisualItem, keep: float) -> list[Row]:
    x, a = item.embeddings, item.saliency
    T, N, _ = x.shape
    budget = budget_of(item, keep)
    first = math.inf if budget >= N else 1.0
    change = {(t, n): 1 - cosine(x[t - 1, n], x[t, n]) if t else first for t in range(T) for n in range(N)}
    best = sorted(change, key=lambda cell: (-change[cell], -float(a[cell]), cell))[:budget]
    return [(t * N + n, x[t, n], 1) for t, n in best]


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 20),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(seed: int, frames: int, tokens: int, keep: float) -> None:
    item = clip(seed, frames, tokens)
    assert_same(TimeChat(keep=keep).reduce(item), literal(item, keep))


def test_a_clip_by_hand() -> None:
    # position 0 never changes, 1 turns around at once, 2 turns by a right angle in the last frame
    x = torch.tensor(
        [[[1, 0], [1, 0], [1, 0]], [[1, 0], [-1, 0], [2, 0]], [[1, 0], [-3, 0], [0, 1]]], dtype=torch.float32
    )
    item = VisualItem(embeddings=x, saliency=torch.tensor([[1.0, 2, 3], [0, 0, 0], [0, 0, 0]]))
    assert TimeChat(keep=0.56).reduce(item).source.tolist() == [0, 1, 2, 4, 8]
    # no room for the first frame: what turned around, and the most salient of what is new
    assert TimeChat(keep=0.23).reduce(item).source.tolist() == [2, 4]


def test_a_picture_keeps_its_most_salient_tokens() -> None:
    item = clip(3, 1, 12)
    ranked = sorted(range(12), key=lambda n: (-float(item.saliency[0, n]), n))
    assert TimeChat(keep=0.25).reduce(item).source.tolist() == sorted(ranked[:3])
