"""LLaVA-Scissor against a literal implementation, and its components against exhaustive search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.pruning import scissor
from mmserve.pruning.base import VisualItem
from mmserve.pruning.linkage import components, spanning_trees
from mmserve.pruning.scissor import Scissor
from tests.pruning.clips import Row, assert_same, budget_of, clip, cosine


def literal(item: VisualItem, keep: float, tau: float) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    tokens = dict(enumerate(x.flatten(0, 1)))
    budget = budget_of(item, keep)
    if budget == T * N:
        return [(n, value, 1) for n, value in tokens.items()]
    same_frame = [(a, b) for a in tokens for b in tokens if a < b and a // N == b // N]
    local = connect(tokens, same_frame, budget, tau)
    means = {min(part): torch.stack([tokens[a] for a in part]).mean(dim=0) for part in local}
    every = [(a, b) for a in means for b in means if a < b]
    joined = connect(means, every, budget, -math.inf)
    centres = [torch.stack([means[a] for a in part]).mean(dim=0) for part in joined]
    parts = [[a for small in local if min(small) in part for a in small] for part in joined]
    members: list[list[int]] = []
    for part, centre in zip(parts, centres, strict=True):
        members.append([max(part, key=lambda a: (cosine(tokens[a], centre), -a))])
    cores = [part[0] for part in members]
    for a, token in tokens.items():
        if a not in cores:
            best = max(range(len(centres)), key=lambda k: cosine(token, centres[k]))
            members[best].append(a)
    return [(part[0], torch.stack([tokens[a] for a in part]).mean(dim=0), len(part)) for part in members]


def connect(
    tokens: dict[int, Tensor], edges: list[tuple[int, int]], count: int, tau: float
) -> list[set[int]]:
    """The components at the highest threshold from `tau` that leaves `count` of them, edge by edge."""
    parts = [{a} for a in tokens]
    edges = [(a, b) for a, b in edges if cosine(tokens[a], tokens[b]) > tau]
    for a, b in sorted(edges, key=lambda edge: -cosine(tokens[edge[0]], tokens[edge[1]])):
        if len(parts) == count:
            break
        one, other = (next(part for part in parts if end in part) for end in (a, b))
        if one is not other:
            parts.remove(other)
            one |= other
    return parts


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 5),
    tokens=st.integers(1, 8),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
    tau=st.sampled_from([0.3, 0.7, 0.9]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, tokens: int, keep: float, tau: float
) -> None:
    item = clip(seed, frames, tokens)
    assert_same(Scissor(keep=keep, tau=tau).reduce(item), literal(item, keep, tau))


@given(seed=st.integers(0, 2**32), groups=st.integers(1, 3), nodes=st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_strongest_edges_hold_together_what_a_threshold_connects(
    seed: int, groups: int, nodes: int
) -> None:
    table = np.random.default_rng(seed).random((groups, nodes, nodes))
    table = np.maximum(table, table.swapaxes(1, 2))
    trees = spanning_trees(table)
    threshold = 0.8
    reached = (table > threshold) | np.eye(nodes, dtype=np.bool_)
    for _ in range(nodes):
        reached = reached @ reached
    head = components(trees, int((trees.strength > threshold).sum())).reshape(groups, nodes)
    assert ((head[:, :, None] == head[:, None, :]) == reached).all()


def test_like_tokens_are_one_wherever_they_stand() -> None:
    # three colours over four frames, moving about
    colours = torch.eye(3)[torch.tensor([[0, 1, 1, 2], [1, 0, 2, 2], [2, 2, 0, 1], [0, 0, 1, 2]])]
    item = VisualItem(embeddings=colours, saliency=torch.zeros(4, 4))
    reduced = Scissor(keep=3 / 16).reduce(item)
    assert reduced.source.tolist() == [0, 1, 3]
    assert reduced.weight.tolist() == [5, 5, 6]
    assert torch.equal(reduced.embeddings, torch.eye(3))


def test_large_tables_of_similarities_are_built_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    item, pruner = clip(6, 8, 13), Scissor(keep=0.2)
    at_once = pruner.reduce(item)
    monkeypatch.setattr(scissor, "_ROWS", 5)
    in_parts = pruner.reduce(item)
    assert torch.equal(in_parts.source, at_once.source)
    assert torch.equal(in_parts.embeddings, at_once.embeddings)
