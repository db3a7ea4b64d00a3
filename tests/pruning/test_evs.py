"""EVS against its definition."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.base import VisualItem
from mmserve.pruning.evs import EVS
from tests.pruning.clips import Row, assert_same, clip, cosine


def literal(item: VisualItem, keep: float) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    score = {(t, n): 1 - cosine(x[t - 1, n], x[t, n]) if t else math.inf for t in range(T) for n in range(N)}
    budget = max(N, math.floor(Fraction(str(keep)) * T * N))
    best = sorted(score, key=lambda cell: (-score[cell], cell))[:budget]
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
    assert_same(EVS(keep=keep).reduce(item), literal(item, keep))


def test_a_clip_by_hand() -> None:
    # position 0 never changes, 1 turns around at once, 2 turns by a right angle in the last frame
    x = torch.tensor(
        [[[1, 0], [1, 0], [1, 0]], [[1, 0], [-1, 0], [2, 0]], [[1, 0], [-3, 0], [0, 1]]], dtype=torch.float32
    )
    item = VisualItem(embeddings=x, saliency=torch.zeros(3, 3))
    assert EVS(keep=0.1).reduce(item).source.tolist() == [0, 1, 2]
    assert EVS(keep=0.45).reduce(item).source.tolist() == [0, 1, 2, 4]
    assert EVS(keep=0.56).reduce(item).source.tolist() == [0, 1, 2, 4, 8]
    # what has not changed goes by position
    assert EVS(keep=0.78).reduce(item).source.tolist() == [0, 1, 2, 3, 4, 5, 8]


def test_the_first_frame_of_a_window_stays() -> None:
    pruner = EVS(keep=0.25, window_frames=4)
    assert pruner.plan(10, 6) == 6 + 6 + 6
    assert pruner.plan(1, 6) == 6
    source = pruner.reduce(clip(1, 10, 6)).source
    assert set(source.tolist()) >= {*range(6), *range(24, 30), *range(48, 54)}
