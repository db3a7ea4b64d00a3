"""STTM against a literal implementation on trees of nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.pruning.base import VisualItem
from mmserve.pruning.quadtree import Grids, grids_of, quadtree
from mmserve.pruning.sttm import STTM
from tests.pruning.clips import Row, assert_same, budget_of, clip, cosine


@dataclass(eq=False)
class Node:
    t: int
    number: int
    tokens: list[int]
    mean: Tensor
    parts: list[Node] = field(default_factory=list)
    score: float = math.inf


def tree(frame: Tensor, t: int, grids: Grids) -> list[Node]:
    """All nodes of a frame in the order of their numbers."""
    nodes = [Node(t, n, [n], frame[n]) for n in range(len(frame))]
    level, shapes = nodes, list(grids)
    while len(level) > 1:
        if len(level) == len(shapes):
            shapes = [(1, len(level))]
        above: list[Node] = []
        left = iter(level)
        for rows, columns in shapes:
            cells = {(r, c): next(left) for r in range(rows) for c in range(columns)}
            for r in range(0, rows, 2):
                for c in range(0, columns, 2):
                    places = [(r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)]
                    parts = [cells[place] for place in places if place in cells]
                    tokens = [n for part in parts for n in part.tokens]
                    node = Node(t, len(nodes) + len(above), tokens, frame[tokens].mean(dim=0), parts)
                    node.score = min(min(cosine(part.mean, node.mean), part.score) for part in parts)
                    above.append(node)
        shapes = [(math.ceil(rows / 2), math.ceil(columns / 2)) for rows, columns in shapes]
        nodes, level = nodes + above, above
    return nodes


def active(node: Node, threshold: float) -> Iterator[Node]:
    if node.score >= threshold:
        yield node
    else:
        for part in node.parts:
            yield from active(part, threshold)


def links(frames: list[list[Node]]) -> list[tuple[float, Node, Node]]:
    """For each active node the one before that it overlaps and is most like."""
    found = []
    for before, now in pairwise(frames):
        for node in now:
            overlap = [other for other in before if set(other.tokens) & set(node.tokens)]
            best = max(overlap, key=lambda other: (cosine(node.mean, other.mean), -other.number))
            found.append((cosine(node.mean, best.mean), node, best))
    return found


def literal(item: VisualItem, pruner: STTM) -> list[Row]:
    x = item.embeddings
    T, N, _ = x.shape
    budget = budget_of(item, pruner.keep)
    if budget == T * N:
        return [(n, value, 1) for n, value in enumerate(x.flatten(0, 1))]
    trees = [tree(x[t], t, grids_of(N, item.grids)) for t in range(T)]
    low, high = -2.0, 2.0 + pruner.step
    for _ in range(16):
        middle = (low + high) / 2
        frames = [list(active(nodes[-1], middle)) for nodes in trees]
        merged = sum(alike >= middle - pruner.step for alike, _, _ in links(frames))
        low, high = (middle, high) if sum(map(len, frames)) - merged <= budget else (low, middle)
    frames = [list(active(nodes[-1], low)) for nodes in trees]
    count = sum(map(len, frames))
    if count < budget:
        return form(x, trees, budget)
    ranked = sorted(links(frames), key=lambda link: (-link[0], link[1].t, link[1].number))
    before = {id(node): other for _, node, other in ranked[: count - budget]}
    groups: dict[int, list[int]] = {}
    for node in (node for nodes in frames for node in sorted(nodes, key=lambda node: node.number)):
        root = node
        while id(root) in before:
            root = before[id(root)]
        source = root.t * N + min(root.tokens)
        groups.setdefault(source, []).extend(node.t * N + n for n in node.tokens)
    return [(source, x.flatten(0, 1)[cells].mean(dim=0), len(cells)) for source, cells in groups.items()]


def form(x: Tensor, trees: list[list[Node]], budget: int) -> list[Row]:
    T, N, _ = x.shape
    limit = T * N - budget
    ranked = [node for nodes in trees for node in nodes if node.parts]
    ranked.sort(key=lambda node: (-node.score, node.number, node.t))
    groups = {(t, n): [n] for t in range(T) for n in range(N)}
    for node in ranked:
        parts = sorted(node.parts, key=lambda part: -cosine(part.mean, node.mean))
        parts = sorted(parts[: limit + 1], key=lambda part: part.number)
        for part in parts[1:]:
            groups[node.t, parts[0].tokens[0]] += groups.pop((node.t, part.tokens[0]))
        limit -= len(parts) - 1
        if limit == 0:
            break
    return [(t * N + n, x[t, cells].mean(dim=0), len(cells)) for (t, n), cells in groups.items()]


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 4),
    grids=st.sampled_from([((1, 1),), ((3, 3),), ((4, 4),), ((2, 5),), ((2, 2), (3, 5)), ((1, 1), (2, 1))]),
    keep=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]),
    step=st.sampled_from([0, 0.2, 1]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_literal_implementation(
    seed: int, frames: int, grids: Grids, keep: float, step: float
) -> None:
    item = replace(clip(seed, frames, sum(rows * columns for rows, columns in grids)), grids=grids)
    pruner = STTM(keep=keep, step=step)
    assert_same(pruner.reduce(item), literal(item, pruner))


@pytest.mark.parametrize("keep", [0.3, 0.4, 0.5, 0.6, 0.8])
def test_a_picture_of_equal_tokens_is_halved_from_its_first_corner(keep: float) -> None:
    x = torch.ones(1, 16, 4, dtype=torch.float64)
    item = VisualItem(embeddings=x, saliency=torch.zeros(1, 16))
    reduced = STTM(keep=keep).reduce(item)
    assert_same(reduced, literal(item, STTM(keep=keep)))
    assert reduced.weight[0] == min(4, 17 - len(reduced.source))


def test_even_ground_is_one_token_and_stays_so_over_time() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.ones(3, 16, 8)
    things = torch.randn(3, 4, 8, generator=rng) * 3
    x[:, [0, 1, 4, 5]] = things  # the first corner changes, token by token and frame by frame
    item = VisualItem(embeddings=x, saliency=torch.zeros(3, 16))
    reduced = STTM(keep=15 / 48).reduce(item)
    assert reduced.source.tolist() == [
        0,
        1,
        2,
        4,
        5,
        8,
        10,
        *(t * 16 + n for t in (1, 2) for n in (0, 1, 4, 5)),
    ]
    assert reduced.weight.tolist() == [1, 1, 12, 1, 1, 12, 12, *[1] * 8]


def test_nodes_are_numbered_level_by_level() -> None:
    tree = quadtree(((2, 3),))
    assert [level.tolist() for level in tree.levels] == [[[0, 1, 3, 4], [2, 5, -1, -1]], [[0, 1, -1, -1]]]
    assert tree.parent.tolist() == [6, 6, 7, 6, 6, 7, 8, 8, -1]
    assert tree.children.tolist() == [0, 0, 0, 0, 0, 0, 4, 2, 2]
    assert tree.first.tolist() == [0, 1, 2, 3, 4, 5, 0, 2, 0]
    first, second = tree.overlaps()
    assert second[first == 7].tolist() == [2, 5, 7, 8]
    assert second[first == 3].tolist() == [3, 6, 8]


def test_unknown_grids_are_a_square_or_a_row() -> None:
    assert grids_of(9, None) == ((3, 3),)
    assert grids_of(10, None) == ((1, 10),)
    assert grids_of(10, ((2, 2), (3, 2))) == ((2, 2), (3, 2))


def test_the_step_is_checked() -> None:
    with pytest.raises(BadRequest, match=r"Expected step from 0 to 2, but got -0\.1"):
        STTM(keep=0.5, step=-0.1)
