"""What holds for every pattern that looks at places, or at few of the keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from mmserve.attention.base import AttentionPattern, Skipping
from mmserve.attention.patterns.flux import Flux
from mmserve.attention.patterns.hip import HiP
from mmserve.attention.patterns.infllm_v2 import InfLLMv2
from mmserve.attention.patterns.loopserve import LoopServe
from mmserve.attention.patterns.power import PowerAttention
from mmserve.attention.patterns.skip_softmax import SkipSoftmax
from mmserve.attention.patterns.tri_shape import TriShape
from mmserve.attention.patterns.triangle_mix import TriangleMix
from mmserve.attention.patterns.zipvl import ZipVL
from mmserve.errors import BadRequest
from tests.attention.patterns.chunks import chunk, seen_by
from tests.attention.views import causal

PATTERNS: list[type[AttentionPattern]] = [
    Flux, HiP, InfLLMv2, LoopServe, PowerAttention, SkipSoftmax, TriShape, TriangleMix, ZipVL,
]  # fmt: skip
# settings by which a chunk of some hundred slots is sparse
NARROW: list[AttentionPattern] = [
    HiP(keys=32, chunk=2, sink=3, local=5, rows=16),
    HiP(keys=8, chunk=1, sink=0, local=1, rows=7),
    InfLLMv2(kernel=8, stride=4, block=16, topk=3, local=16, rows=16),
    InfLLMv2(kernel=8, stride=4, block=64, topk=1, sink=0, local=0, rows=10),
    LoopServe(recall=0.1, samples=8),
    PowerAttention(block=16, window=2),
    PowerAttention(block=64, window=1, sink=0),
    TriShape(sink=3, local=9, bottom=4),
    TriangleMix(sink=3, local=9, bottom=4, first_layer=0),
    ZipVL(mass=0.4),
]
SHAPES: list[tuple[int | Sequence[int], int]] = [
    (1, 1),
    (2, 2),
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


@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_everything_is_dense(pattern: type[AttentionPattern]) -> None:
    for rows, slots in SHAPES:
        view = chunk(rows, slots)
        found = pattern.everything().index(view)
        if found is None:
            continue
        seen = seen_by(found, view)
        assert torch.equal(seen, causal(view).expand_as(seen)), (rows, slots)
        assert not isinstance(found, Skipping) or found.threshold == 0


@pytest.mark.parametrize("pattern", NARROW, ids=name)
def test_an_index_of_any_shape_is_one(pattern: AttentionPattern) -> None:
    for rows, slots in SHAPES:
        view = chunk(rows, slots, kv_heads=1, group=3)
        seen_by(pattern.index(view), view)


@pytest.mark.parametrize("pattern", NARROW, ids=name)
def test_long_chunks_are_sparse_and_the_same_each_time(pattern: AttentionPattern) -> None:
    view = chunk(300, 777)
    seen = seen_by(pattern.index(view), view)
    assert torch.equal(seen_by(pattern.index(view), view), seen)
    assert seen.sum() < 0.8 * causal(view).expand_as(seen).sum()


@pytest.mark.parametrize("tile_rows", [16, 48, 128, 1024])
@pytest.mark.parametrize("pattern", [each for each in NARROW if each.name != "zipvl"], ids=name)
def test_how_rows_are_tiled_changes_nothing(pattern: AttentionPattern, tile_rows: int) -> None:
    view, other = (chunk(300, 777, tile_rows=rows) for rows in (192, tile_rows))
    assert torch.equal(seen_by(pattern.index(other), other), seen_by(pattern.index(view), view))


@pytest.mark.parametrize("pattern", NARROW, ids=name)
def test_keys_in_pages_and_short_types_are_taken_as_they_are(pattern: AttentionPattern) -> None:
    view, paged = (chunk(200, 520, dtype=torch.bfloat16) for _ in range(2))
    wide = torch.zeros(len(view.keys), 7, view.keys.shape[2], dtype=torch.bfloat16)
    wide[:, 2:4] = view.keys
    object.__setattr__(paged, "keys", wide[:, 2:4])
    assert torch.equal(seen_by(pattern.index(paged), paged), seen_by(pattern.index(view), view))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flux(local=0),
        lambda: HiP(keys=0),
        lambda: InfLLMv2(block=72),
        lambda: InfLLMv2(stride=64),
        lambda: LoopServe(recall=1.5),
        lambda: PowerAttention(window=0),
        lambda: SkipSoftmax(scale=-1.0),
        lambda: TriShape(local=0),
        lambda: TriShape(bottom=-1),
        lambda: TriangleMix(first_layer=-1),
        lambda: ZipVL(mass=0.0),
        lambda: ZipVL(probes=65),
    ],
)
def test_settings_out_of_range_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(BadRequest):
        build()
