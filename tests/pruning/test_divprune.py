"""DivPrune against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.base import VisualItem
from mmserve.pruning.divprune import DivPrune
from tests.pruning.clips import Row, assert_same, clip, cosine, even


def literal(item: VisualItem, keep: float) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    rows: list[Row] = []
    for t, quota in enumerate(even(T, max(1, math.floor(Fraction(str(keep)) * T * N)))):
        apart = {(i, j): 1 - cosine(x[t, i], x[t, j]) for i in range(N) for j in range(N)}
        chosen: list[int] = []
        while len(chosen) < quota:
            others = {i: chosen or [j for j in range(N) if j != i] for i in range(N) if i not in chosen}
            nearest = {i: min((apart[i, j] for j in js), default=math.inf) for i, js in others.items()}
            chosen.append(max(nearest, key=lambda i: (nearest[i], -i)))
        rows += [(t * N + n, x[t, n], 1) for n in chosen]
    return rows


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 8),
    tokens=st.integers(1, 16),
    keep=st.sampled_from([0.02, 0.1, 0.25, 0.5, 0.9]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(seed: int, frames: int, tokens: int, keep: float) -> None:
    item = clip(seed, frames, tokens)
    assert_same(DivPrune(keep=keep).reduce(item), literal(item, keep))


def test_a_picture_by_hand() -> None:
    # angles of 0, 10, 20, 90 and 170 degrees: 170 stands most apart, then 0, then 90, then 20
    angles = torch.tensor([0, 10, 20, 90, 170], dtype=torch.float64).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1], [2], [3], [4], [5]])
    item = VisualItem(embeddings=x[None], saliency=torch.zeros(1, 5), modality="image")
    kept = [DivPrune(keep=count / 5).reduce(item).source.tolist() for count in range(1, 5)]
    assert kept == [[4], [0, 4], [0, 3, 4], [0, 2, 3, 4]]


def test_copies_are_chosen_last_and_by_index() -> None:
    x = torch.eye(4)[[0, 0, 1, 1, 2]][None]
    item = VisualItem(embeddings=x, saliency=torch.zeros(1, 5), modality="image")
    kept = [DivPrune(keep=count / 5).reduce(item).source.tolist() for count in range(1, 5)]
    assert kept == [[4], [0, 4], [0, 2, 4], [0, 1, 2, 4]]
