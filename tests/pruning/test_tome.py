"""ToMe against a literal implementation in loops."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.pruning.base import VisualItem
from mmserve.pruning.tome import ToMe
from tests.pruning.clips import Row, assert_same, budget_of, clip, cosine, even


def literal(item: VisualItem, keep: float, rounds: int) -> list[Row]:
    T, N, _ = item.embeddings.shape
    rows: list[Row] = []
    for t, count in enumerate(even(T, budget_of(item, keep))):
        if count:
            merged = merge(list(item.embeddings[t]), count, rounds)
            rows += [(t * N + n, value, size) for n, value, size in merged]
    return rows


def merge(frame: list[Tensor], count: int, rounds: int) -> list[tuple[int, Tensor, int]]:
    tokens = [(n, value, 1) for n, value in enumerate(frame)]
    while len(tokens) > count:
        merges = min(math.ceil((len(tokens) - count) / rounds), len(tokens) // 2)
        rounds = max(1, rounds - 1)
        edges = []
        for a in range(0, len(tokens), 2):
            alike = {b: cosine(tokens[a][1], tokens[b][1]) for b in range(1, len(tokens), 2)}
            best = max(alike, key=lambda b: (alike[b], -b))
            edges.append((-alike[best], a, best))
        chosen = sorted(edges)[:merges]
        for _, a, b in chosen:
            (_, given_value, given), (n, value, size) = tokens[a], tokens[b]
            tokens[b] = n, (size * value + given * given_value) / (size + given), size + given
        gone = {a for _, a, _ in chosen}
        tokens = [token for place, token in enumerate(tokens) if place not in gone]
    return tokens


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 5),
    tokens=st.integers(1, 20),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
    rounds=st.sampled_from([1, 3, 8]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, rounds: int
) -> None:
    item = clip(seed, frames, tokens)
    assert_same(ToMe(keep=keep, rounds=rounds).reduce(item), literal(item, keep, rounds))


def test_a_picture_by_hand() -> None:
    # places 0, 2, 4 look for a partner among 1, 3
    x = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.2, 1], [-1, 0]]])
    item = VisualItem(embeddings=x, saliency=torch.zeros(1, 5))
    once = ToMe(keep=0.8).reduce(item)
    assert once.source.tolist() == [1, 2, 3, 4]
    assert once.weight.tolist() == [2, 1, 1, 1]
    torch.testing.assert_close(once.embeddings[0], torch.tensor([1, 0.05]))
    assert ToMe(keep=0.6, rounds=1).reduce(item).weight.tolist() == [2, 2, 1]
    assert ToMe(keep=0.2).reduce(item).weight.tolist() == [5]


def test_few_tokens_come_from_frames_spread_over_the_clip() -> None:
    source = ToMe(keep=0.05).reduce(clip(5, 8, 10)).source
    assert (source // 10).tolist() == [0, 2, 4, 6]
