"""ZipVL's important slots, by the paper's two rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.zipvl import ZipVL
from tests.attention.patterns.chunks import chunk, seen_by, weights_of
from tests.attention.views import causal


def important(pattern: ZipVL, view: ChunkView) -> set[int]:
    rows = len(view.rows)
    recent = min(pattern.probes, rows)
    spread = min(pattern.probes, rows - recent)
    probes = [*range(rows - recent, rows), *(at * (rows - recent) // spread for at in range(spread))]
    heads = view.queries.shape[1]
    got = sum((weights_of(view, head)[probes].sum(0) for head in range(heads)), torch.zeros(())) / heads
    total, count = 0.0, 0
    for share in got.sort(descending=True).values.tolist():
        count += 1
        total += share
        if total >= pattern.mass * len(probes):
            break
    givers = causal(view)[probes].sum(0).clamp(min=1)
    return set((got / givers).topk(count).indices.tolist())


@pytest.mark.parametrize(
    ("rows", "slots", "mass", "probes"), [(130, 500, 0.7, 64), (300, 300, 0.9, 20), (40, 90, 0.5, 64)]
)
def test_important_slots_see_the_important_ones_before_them(
    rows: int, slots: int, mass: float, probes: int
) -> None:
    view, pattern = chunk(rows, slots, spread=4.0), ZipVL(mass=mass, probes=probes)
    chosen = important(pattern, view)
    assert 0 < len(chosen) < slots
    is_important = torch.zeros(slots, dtype=torch.bool)
    is_important[list(chosen)] = True
    seen = seen_by(pattern.index(view), view)
    assert (seen == seen[:1]).all()
    among = is_important[torch.from_numpy(view.rows).long()]
    assert torch.equal(seen[0, among], (is_important & causal(view))[among])
    # the others see themselves, and of their own kind only such as share their tile
    others = seen[0, ~among]
    assert not others[:, is_important].any()
    assert others.sum(-1).max() <= view.tile_rows
    assert (others.sum(-1) >= 1).all()


def peaked(view: ChunkView, keys: int) -> Tensor:
    """Make all rows look at the first few keys."""
    view.queries[:] = 1.0
    view.keys[:] = 0.0
    view.keys[:keys] = 5.0
    return view.keys


def test_a_layer_that_looks_at_few_slots_takes_few() -> None:
    few, flat = chunk(100, 400), chunk(100, 400)
    peaked(few, 10)
    peaked(flat, 0)
    pattern = ZipVL(mass=0.9)
    counts = [len(important(pattern, view)) for view in (few, flat)]
    assert counts[0] <= 10
    assert counts[1] > 300
    # of the slots before the chunk
    kept = [int(seen_by(pattern.index(view), view)[0, :, :300].any(0).sum()) for view in (few, flat)]
    assert kept[0] <= 10
    assert kept[1] > 200
