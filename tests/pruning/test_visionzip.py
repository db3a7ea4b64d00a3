"""VisionZip against a literal implementation in loops."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.errors import BadRequest
from mmserve.pruning.base import VisualItem, make_pruner
from mmserve.pruning.visionzip import VisionZip
from tests.pruning.clips import Row, assert_same, clip, cosine, even, most_salient


def literal(item: VisualItem, keep: float, dominant: float) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    rows: list[Row] = []
    for t, quota in enumerate(even(T, max(1, math.floor(Fraction(str(keep)) * T * N)))):
        first = most_salient(item, t, range(N), math.floor(quota * dominant + 0.5))
        rows += [(t * N + n, x[t, n], 1) for n in first]
        rest = [n for n in range(N) if n not in first]
        count = quota - len(first)
        members = {rest[j * len(rest) // count]: [rest[j * len(rest) // count]] for j in range(count)}
        for n in rest:
            if members and n not in members:
                likes = {target: cosine(x[t, n], x[t, target]) for target in members}
                members[max(likes, key=lambda target: (likes[target], -target))].append(n)
        rows += [(t * N + n, x[t, own].mean(dim=0), len(own)) for n, own in members.items()]
    return rows


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 8),
    tokens=st.integers(1, 24),
    keep=st.sampled_from([0.02, 0.05, 0.1, 0.25, 0.5, 0.7, 0.9]),
    dominant=st.sampled_from([54 / 64, 0.0, 0.4, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, dominant: float
) -> None:
    item = clip(seed, frames, tokens)
    pruner = VisionZip(keep=keep, dominant=dominant)
    assert_same(pruner.reduce(item), literal(item, keep, dominant))


def test_a_picture_by_hand() -> None:
    # two directions; the most salient token stays, every third of the others is a target
    x = torch.tensor([[5, 5], [2, 0], [0, 2], [4, 0], [0, 4], [0, 6], [8, 0]], dtype=torch.float64)
    item = VisualItem(embeddings=x[None], saliency=torch.tensor([[9.0, 1, 1, 1, 1, 1, 1]]), modality="image")
    reduced = VisionZip(keep=0.43, dominant=0.34).reduce(item)
    # targets are 1 and 4: 3 and 6 lie on the first, 2 and 5 on the second
    assert reduced.source.tolist() == [0, 1, 4]
    assert reduced.weight.tolist() == [1, 3, 3]
    torch.testing.assert_close(
        reduced.embeddings, torch.tensor([[5, 5], [14 / 3, 0], [0, 4]], dtype=torch.float64)
    )


def test_settings_are_checked() -> None:
    with pytest.raises(BadRequest, match="Expected dominant from 0 to 1, but got 2"):
        make_pruner("visionzip", 0.5, dominant=2)
