"""DyCoke's merging in time against its definition."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.base import VisualItem
from mmserve.pruning.dycoke import DyCoke
from tests.pruning.clips import Row, assert_same, clip, cosine, even


def compared_with(t: int, group: int) -> int | None:
    """Groups are halved over and over: the first frame of a second half sees the first one of the whole."""
    if t % group == 0:
        return None
    start, size = t - t % group, group // 2
    while True:
        if t == start + size:
            return start
        start, size = start + size * (t > start + size), size // 2


def literal(item: VisualItem, keep: float) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    budget = max(N, math.floor(Fraction(str(keep)) * T * N))
    group = 4
    while math.ceil(T / group) * N > budget:
        group *= 2
    whole = [t for t in range(T) if compared_with(t, group) is None]
    others = [t for t in range(T) if t not in whole]
    rows: list[Row] = [(t * N + n, x[t, n], 1) for t in whole for n in range(N)]
    for t, quota in zip(others, even(len(others), budget - len(whole) * N) if others else [], strict=True):
        before = compared_with(t, group)
        best = sorted(range(N), key=lambda n: (cosine(x[t, n], x[before, n]), n))[:quota]
        rows += [(t * N + n, x[t, n], 1) for n in best]
    return rows


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 18),
    tokens=st.integers(1, 12),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.475, 0.7, 0.9, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(seed: int, frames: int, tokens: int, keep: float) -> None:
    item = clip(seed, frames, tokens)
    assert_same(DyCoke(keep=keep).reduce(item), literal(item, keep))


def test_a_group_by_hand() -> None:
    # in each later frame another position turns around, seen from the frame it is compared with
    still = torch.tensor([1.0, 0.0]).expand(4, 3, 2).clone()
    for turned in ((1, 0), (2, 1), (3, 1), (3, 2)):
        still[turned] *= -1
    item = VisualItem(embeddings=still, saliency=torch.zeros(4, 3))
    assert DyCoke(keep=0.5).reduce(item).source.tolist() == [0, 1, 2, 3, 7, 11]


@pytest.mark.parametrize(
    ("frames", "keep", "group"), [(32, 0.475, 4), (32, 0.25, 4), (32, 0.1, 16), (64, 0.01, 64)]
)
def test_groups_double_until_their_first_frames_fit(frames: int, keep: float, group: int) -> None:
    source = DyCoke(keep=keep).reduce(clip(2, frames, 5)).source
    counts = torch.bincount(source // 5, minlength=frames)
    assert len(source) == max(5, math.floor(Fraction(str(keep)) * frames * 5))
    assert bool((counts[::group] == 5).all())
    others = counts[torch.arange(frames) % group != 0]
    assert int(others.max() - others.min()) <= 1
