"""A-shape against its definition, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmserve.attention.base import ChunkView, make_pattern
from mmserve.attention.patterns.a_shape import ROWS
from mmserve.errors import BadRequest
from tests.attention.views import LAYOUTS, causal, checked, index_of, kinds, view


def by_tokens(of: ChunkView, sink: int, local: int) -> torch.Tensor:
    """Blocks of rows share the band of their first row."""
    slots, rows = torch.arange(len(of.keys)), torch.from_numpy(of.rows).long()
    first = rows[0] + (rows - rows[0]) // ROWS * ROWS
    return causal(of) & ((slots < sink) | (slots > first[:, None] - local))


def by_frames(of: ChunkView, sink: int, frames: int) -> torch.Tensor:
    own = torch.from_numpy(np.maximum.accumulate(of.frame)).long()
    rows, slots = torch.from_numpy(of.rows).long(), torch.arange(len(of.keys))
    return causal(of) & ((slots < sink) | (own > own[rows][:, None] - frames))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sink", "local"), [(0, 1), (5, 40), (64, 1), (1000, 3), (3, 10**6)])
def test_rows_see_the_first_keys_and_the_latest(layout: str, sink: int, local: int) -> None:
    of = kinds(LAYOUTS[layout])
    for rows in (range(len(of.item)), range(61, len(of.item))):
        shown = view(of, rows)
        index = index_of(make_pattern("a_shape", sink=sink, local=local).index(shown))
        assert index is not None
        assert (checked(index, shown) == by_tokens(shown, sink, local)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sink", "frames"), [(0, 1), (16, 2), (3, 5), (70, 100)])
def test_rows_see_whole_frames(layout: str, sink: int, frames: int) -> None:
    of = kinds(LAYOUTS[layout])
    for rows in (range(len(of.item)), range(61, len(of.item))):
        shown = view(of, rows)
        index = index_of(make_pattern("a_shape", sink=sink, local_frames=frames).index(shown))
        assert index is not None
        assert (checked(index, shown) == by_frames(shown, sink, frames)).all()


@pytest.mark.parametrize("settings", [{"sink": -1}, {"local": 0}, {"local": 1.5}, {"local_frames": True}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match="a whole number from"):
        make_pattern("a_shape", **settings)
