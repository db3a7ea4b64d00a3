"""Patterns of single keys against their papers' rules."""

from __future__ import annotations

import math

import pytest
import torch

from mmserve.attention.patterns.anchor import AnchorAttention
from mmserve.attention.patterns.vecattention import VecAttention
from tests.attention.patterns.chunks import blocks_of, chunk, scores_of, seen_by
from tests.attention.views import causal

SHAPES = [(300, 900), (256, 1024), (130, 130), (77, 500), (520, 1100), (64, 150)]


@pytest.mark.parametrize(("rows", "slots"), SHAPES)
@pytest.mark.parametrize(
    ("theta", "step", "size"), [(1.0, 1, 128), (2.0, 2, 128), (0.0, 16, 128), (2.0, 3, 32)]
)
def test_anchor_sees_keys_that_come_near_the_largest_close_by(
    rows: int, slots: int, theta: float, step: int, size: int
) -> None:
    view = chunk(rows, slots)
    expected = torch.zeros(4, rows, slots, dtype=torch.bool)
    for head in range(4):
        scores = scores_of(view, head)
        visible = scores.masked_fill(~causal(view), -torch.inf)
        for group in blocks_of(rows, size * step):
            first = int(view.rows[group.start])
            seen = torch.zeros(slots, dtype=torch.bool)
            seen[:size] = True
            seen[first:] = True
            for block in blocks_of(group.stop - group.start, size):
                own = slice(group.start + block.start, group.start + block.stop)
                near = torch.cat([visible[own, :size], visible[own, first:]], 1)
                anchor = near.amax(1).mean()
                mean = scores[own].mean(0)
                seen |= (mean >= anchor - theta) & (torch.arange(slots) < first)
            expected[head, group] = seen
    found = seen_by(AnchorAttention(theta=theta, step=step, block=size).index(view), view)
    assert torch.equal(found, expected & causal(view))


@pytest.mark.parametrize(("rows", "slots"), SHAPES)
@pytest.mark.parametrize(
    ("threshold", "tile", "size"),
    [(0.8, 256, 64), (0.3, 16, 64), (0.5, 100, 128), (0.05, 0, 64), (1.0, 256, 16), (0.1, 0, 16)],
)
def test_vecattention_sees_keys_near_the_largest_of_their_tile(
    rows: int, slots: int, threshold: float, tile: int, size: int
) -> None:
    view = chunk(rows, slots)
    expected = torch.zeros(4, rows, slots, dtype=torch.bool)
    for head in range(4):
        scores = scores_of(view, head)
        for block in blocks_of(rows, size):
            first, last = int(view.rows[block.start]), int(view.rows[block.stop - 1])
            mean = scores[block].mean(0).tolist()
            seen = {*range(size), *range(first, last + 1)}
            largest: dict[int, float] = {}
            for key in range(size, first) if tile else range(last + 1):
                place = key // tile if tile else 0
                largest[place] = max(mean[key], largest.get(place, -math.inf))
            for key in range(size, first):
                if mean[key] >= largest[key // tile if tile else 0] + math.log(threshold):
                    seen.add(key)
            expected[head, block, sorted(key for key in seen if key < slots)] = True
    found = seen_by(VecAttention(threshold=threshold, tile_keys=tile, block=size).index(view), view)
    assert torch.equal(found, expected & causal(view))
