"""Patterns that look at no score, against their masks written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.a_shape import ROWS
from mmserve.attention.patterns.power import PowerAttention
from mmserve.attention.patterns.skip_softmax import SkipSoftmax
from mmserve.attention.patterns.tri_shape import TriShape
from mmserve.attention.patterns.triangle_mix import TriangleMix
from tests.attention.patterns.chunks import chunk, seen_by
from tests.attention.views import causal


def triangle(view: ChunkView, *, sink: int, local: int, bottom: int) -> Tensor:
    """Row by row: a band begins where that of the first of its block of rows does."""
    slots = len(view.keys)
    mask = torch.zeros(len(view.rows), slots, dtype=torch.bool)
    for row, slot in enumerate(view.rows.tolist()):
        first = int(view.rows[row // ROWS * ROWS])
        mask[row, : min(sink, slot + 1)] = True
        mask[row, max(0, first - local + 1) : slot + 1] = True
        if slot >= slots - bottom:
            mask[row, : slot + 1] = True
    return mask


@pytest.mark.parametrize(("rows", "slots"), [(40, 40), (300, 400), (257, 700), (1, 300)])
@pytest.mark.parametrize(("sink", "local", "bottom"), [(16, 40, 30), (0, 1, 0), (5, 200, 500)])
def test_tri_shape_is_a_sink_a_band_and_dense_last_rows(
    rows: int, slots: int, sink: int, local: int, bottom: int
) -> None:
    view = chunk(rows, slots)
    seen = seen_by(TriShape(sink=sink, local=local, bottom=bottom).index(view), view)
    expected = triangle(view, sink=sink, local=local, bottom=bottom)
    assert torch.equal(seen, expected.expand_as(seen))


def test_a_band_of_frames_is_whole_frames_and_the_text_between() -> None:
    frame = np.maximum((np.arange(150) - 5) // 7, -1)
    frame = np.where(frame == 10, -1, frame).astype(np.int32)
    view = replace(chunk(90, 150), frame=frame)
    seen = seen_by(TriShape(sink=2, local_frames=2, bottom=0).index(view), view)
    latest = torch.from_numpy(np.maximum.accumulate(frame))
    expected = (latest >= latest[torch.from_numpy(view.rows).long()][:, None] - 1) | (torch.arange(150) < 2)
    assert torch.equal(seen, (expected & causal(view)).expand_as(seen))


def test_triangle_mix_is_dense_below_its_first_layer() -> None:
    pattern = TriangleMix(sink=4, local=20, bottom=10)
    assert pattern.index(chunk(150, 200, layer=3)) is None
    view = chunk(150, 200, layer=4)
    triangle = TriShape(sink=4, local=20, bottom=10)
    assert torch.equal(seen_by(pattern.index(view), view), seen_by(triangle.index(view), view))
    assert TriangleMix(first_layer=5).index(chunk(10, 20, layer=4)) is None
    assert TriangleMix(first_layer=5).index(chunk(10, 20, layer=5)) is not None


@pytest.mark.parametrize(("block", "window", "sink"), [(16, 3, 1), (16, 1, 0), (64, 2, 2), (12, 2, 1)])
@pytest.mark.parametrize(("before", "rows"), [(0, 200), (12, 70), (30, 33)])
def test_power_attention_sees_blocks_at_powers_of_two(
    block: int, window: int, sink: int, before: int, rows: int
) -> None:
    # chunks that begin where a block does see exactly the paper's mask
    view = chunk(rows, before * block + rows)
    seen = seen_by(PowerAttention(block=block, window=window, sink=sink).index(view), view)
    own = torch.from_numpy(view.rows)[:, None] // block
    key = torch.arange(len(view.keys)) // block
    expected = (own - key < window) | (key < sink)
    for power in range(12):
        expected |= own - key == 2**power
    assert torch.equal(seen, (expected & causal(view)).expand_as(seen))


def test_power_attention_across_a_cut_sees_what_either_block_does() -> None:
    aligned, shifted = chunk(64, 320), chunk(60, 320)
    pattern = PowerAttention(block=16, window=1, sink=0)
    exact = seen_by(pattern.index(aligned), aligned)[0, 4:]
    wider = seen_by(pattern.index(shifted), shifted)[0]
    assert (wider | ~exact).all()
    assert wider.view(60, 20, 16).any(-1).sum(-1).max() <= 2 * 6


def test_skip_softmax_lowers_its_threshold_with_the_length() -> None:
    pattern = SkipSoftmax(scale=2.0)
    for slots in (10, 100):
        view = chunk(10, slots)
        found = pattern.index(view)
        assert torch.equal(seen_by(found, view)[0], causal(view))
        assert found.threshold == pytest.approx(2.0 / slots)
    assert pattern.index(chunk(1, 1)).threshold == 1
