"""What holds for every pattern that looks at queries and keys to choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from mmserve.attention.base import AttentionPattern
from mmserve.attention.patterns.anchor import AnchorAttention
from mmserve.attention.patterns.block_sparse import BlockSparse
from mmserve.attention.patterns.critiprefill import CritiPrefill
from mmserve.attention.patterns.flexprefill import FlexPrefill
from mmserve.attention.patterns.sparge import Sparge
from mmserve.attention.patterns.vecattention import VecAttention
from mmserve.attention.patterns.vertical_slash import VerticalSlash
from mmserve.attention.patterns.xattention import XAttention
from mmserve.errors import BadRequest
from tests.attention.patterns.chunks import chunk, seen_by
from tests.attention.views import causal

PATTERNS: list[type[AttentionPattern]] = [
    AnchorAttention,
    BlockSparse,
    CritiPrefill,
    FlexPrefill,
    Sparge,
    VecAttention,
    VerticalSlash,
    XAttention,
]
# settings by which a chunk of some hundred slots is sparse
NARROW: list[AttentionPattern] = [
    AnchorAttention(theta=1.0, step=1),
    BlockSparse(blocks=2),
    CritiPrefill(budget=64),
    FlexPrefill(min_budget=128, gamma=0.3),
    Sparge(similarity=-1.0, cumulative=0.3),
    VecAttention(threshold=0.9),
    VecAttention(threshold=0.5, tile_keys=0),
    VerticalSlash(vertical=40, slash=110),
    XAttention(threshold=0.3),
    XAttention(threshold=0.3, stride=8),
]
SHAPES: list[tuple[int | Sequence[int], int]] = [
    (1, 1),
    (1, 700),
    (130, 130),
    (65, 200),
    (300, 777),
    # the last slots are somebody else's, or some between are missing
    (range(400, 600), 640),
    ([*range(300, 340), *range(350, 500), 639], 640),
]


def name(pattern: AttentionPattern | type[AttentionPattern]) -> str:
    return pattern.name


@pytest.mark.parametrize(("rows", "slots"), SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_everything_is_dense(pattern: type[AttentionPattern], rows: int | Sequence[int], slots: int) -> None:
    view = chunk(rows, slots, memory={})
    seen = seen_by(pattern.everything().index(view), view)
    assert torch.equal(seen, causal(view).expand_as(seen))


@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_the_defaults_are_an_index_of_any_shape(pattern: type[AttentionPattern]) -> None:
    for rows, slots in SHAPES:
        view = chunk(rows, slots, kv_heads=1, group=3, memory={})
        seen_by(pattern().index(view), view)


@pytest.mark.parametrize("tile_rows", [16, 48, 128, 1024])
@pytest.mark.parametrize("pattern", NARROW, ids=name)
def test_how_rows_are_tiled_changes_nothing(pattern: AttentionPattern, tile_rows: int) -> None:
    view, other = (chunk(300, 777, tile_rows=rows) for rows in (192, tile_rows))
    seen = seen_by(pattern.index(view), view)
    assert torch.equal(seen_by(pattern.index(other), other), seen)
    assert not torch.equal(seen, causal(view).expand_as(seen))


@pytest.mark.parametrize("pattern", NARROW, ids=name)
def test_keys_in_pages_and_short_types_are_taken_as_they_are(pattern: AttentionPattern) -> None:
    view = chunk(200, 520, dtype=torch.bfloat16)
    wide = torch.zeros(len(view.keys), 7, view.keys.shape[2], dtype=torch.bfloat16)
    wide[:, 2:4] = view.keys
    paged = chunk(200, 520, dtype=torch.bfloat16)
    object.__setattr__(paged, "keys", wide[:, 2:4])
    assert torch.equal(seen_by(pattern.index(paged), paged), seen_by(pattern.index(view), view))


@pytest.mark.parametrize(
    "build",
    [
        lambda: AnchorAttention(theta=-1.0),
        lambda: AnchorAttention(step=0),
        lambda: BlockSparse(blocks=0),
        lambda: BlockSparse(block=24),
        lambda: CritiPrefill(budget=0),
        lambda: CritiPrefill(segment=100),
        lambda: FlexPrefill(gamma=0.0),
        lambda: FlexPrefill(tau=1.5),
        lambda: Sparge(similarity=2.0),
        lambda: Sparge(skip=1.0),
        lambda: VecAttention(threshold=1.01),
        lambda: VecAttention(tile_keys=-1),
        lambda: VerticalSlash(vertical=1),
        lambda: VerticalSlash(slash=99),
        lambda: XAttention(stride=3),
        lambda: XAttention(stride=32, block=16),
        lambda: XAttention(threshold=-0.1),
        lambda: XAttention(thresholds="0.5,much"),
        lambda: XAttention(thresholds="0.5,1.5"),
    ],
)
def test_settings_out_of_range_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(BadRequest):
        build()
