"""LoopServe's lines against a greedy choice made one line at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmserve.attention.patterns.loopserve import LoopServe, greedy_lines
from tests.attention.patterns.chunks import chunk, seen_by, weights_of


def attention(heads: int, rows: int, slots: int, step: int, seed: int) -> Tensor:
    """Weights of rows `step` apart, the last one being the last slot; no two lines gain the same."""
    scores = 3 * torch.randn(heads, rows, slots, generator=torch.Generator().manual_seed(seed))
    places = slots - 1 - step * torch.arange(rows - 1, -1, -1)
    return scores.masked_fill(torch.arange(slots) > places[:, None], -torch.inf).softmax(-1)


def one_by_one(weights: Tensor, step: int, recall: float) -> tuple[set[int], set[int]]:
    """Of one head, [rows, slots]: the line of largest gain, again and again."""
    rows, slots = weights.shape
    left = weights.double().clone()
    vertical: set[int] = set()
    slash: set[int] = set()
    while float(left.sum()) > (1 - recall) * rows:
        gains: dict[tuple[str, int], float] = {}
        for row in range(rows):
            place = slots - 1 - step * (rows - 1 - row)
            for key in range(place + 1):
                for line in (("vertical", key), ("slash", place - key)):
                    gains[line] = gains.get(line, 0.0) + float(left[row, key])
        kind, at = max(gains, key=lambda line: gains[line])
        (vertical if kind == "vertical" else slash).add(at)
        for row in range(rows):
            place = slots - 1 - step * (rows - 1 - row)
            key = at if kind == "vertical" else place - at
            if 0 <= key < slots:
                left[row, key] = 0.0
    return vertical, slash


def covered(weights: Tensor, step: int, vertical: Tensor, slash: Tensor) -> Tensor:
    """The mean share of the rows' attention under lines bool [heads, slots]; [heads]."""
    heads, rows, slots = weights.shape
    places = slots - 1 - step * torch.arange(rows - 1, -1, -1)
    before = (places[:, None] - torch.arange(slots)).clamp(min=0)
    under = vertical[:, None] | slash[:, before.flatten()].view(heads, rows, slots)
    return (weights * under).sum((1, 2)) / rows


@pytest.mark.parametrize(("rows", "slots", "step"), [(4, 30, 5), (6, 40, 1), (1, 20, 1)])
@pytest.mark.parametrize("recall", [0.5, 0.9])
def test_lines_one_at_a_time_are_the_greedy_choice(rows: int, slots: int, step: int, recall: float) -> None:
    weights = attention(2, rows, slots, step, seed=rows)
    lines = greedy_lines(weights.clone(), step, recall, share=0.0)
    for head in range(2):
        vertical, slash = one_by_one(weights[head], step, recall)
        # with one row a key is as good as its diagonal
        if rows > 1:
            assert set(lines.vertical[head].nonzero().flatten().tolist()) == vertical
            assert set(lines.slash[head].nonzero().flatten().tolist()) == slash
        assert int(lines.vertical[head].sum() + lines.slash[head].sum()) == len(vertical) + len(slash)


@pytest.mark.parametrize("recall", [0.3, 0.8, 0.955])
def test_lines_in_rounds_reach_the_target_with_few_more(recall: float) -> None:
    weights = attention(3, 16, 400, 7, seed=1)
    exact = greedy_lines(weights.clone(), 7, recall, share=0.0)
    rounds = greedy_lines(weights.clone(), 7, recall)
    for lines in (exact, rounds):
        assert (covered(weights, 7, lines.vertical, lines.slash) >= recall - 1e-5).all()
    counts = [int(lines.vertical.sum() + lines.slash.sum()) for lines in (exact, rounds)]
    assert counts[1] <= 1.25 * counts[0]


def test_an_index_covers_its_share_of_the_sampled_rows() -> None:
    view = chunk(256, 700, spread=4.0)
    for recall in (0.5, 0.9):
        seen = seen_by(LoopServe(recall=recall, samples=16).index(view), view)
        sampled = list(range(15, 256, 16))
        for head in range(len(seen)):
            weights = weights_of(view, head)[sampled]
            share = (weights * seen[head, sampled]).sum(-1).mean()
            assert share >= recall - 1e-5
