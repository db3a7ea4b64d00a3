"""MMInference: the mask of lines and boundaries key by key, what is found online, and dense attention."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmserve.attention.base import ChunkView, PatternMemory
from mmserve.attention.patterns.boundary import gather
from mmserve.attention.patterns.grid import find_grids, frame_stride
from mmserve.attention.patterns.lines import build_index
from mmserve.attention.patterns.mminference import MMInference, index_of
from mmserve.attention.patterns.online import find_lines
from mmserve.attention.profile import BOUNDARIES, Head, Lines
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import prefill_attention
from mmserve.kernels.prefill_attention.index import check_index
from tests.attention.mminference_cases import (
    expected_mask,
    layout,
    random_found,
    random_head,
    union_mask,
    view_of,
)


@pytest.mark.parametrize("batch", range(8))
def test_the_mask_equals_a_construction_key_by_key_on_random_layouts(batch: int) -> None:
    """25 layouts each: text in pieces, several clips, images between; chunks; all boundaries."""
    for seed in range(batch * 25, batch * 25 + 25):
        rng = np.random.default_rng(seed)
        parts = layout(rng, int(rng.integers(0, 4)), 9)
        slots = len(parts[0])
        start = int(rng.integers(0, slots)) if rng.random() < 0.5 else 0
        view = view_of(rng, parts, heads=4, start=start, tile_rows=16)
        heads = [random_head(rng) for _ in range(4)]
        found = random_found(rng, heads, view)
        index = build_index(view, gather(view.is_visual), heads, found)
        check_index(index, torch.full((1, 2), slots), q_heads=4)
        expected = expected_mask(view, heads, found, 16)
        np.testing.assert_array_equal(union_mask(index, view), expected, f"seed {seed}")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_everything_is_dense(boundary: str) -> None:
    rng = np.random.default_rng(1)
    view = view_of(rng, layout(rng, 3, 20), start=7)
    pattern = MMInference(boundary=boundary, local=1 << 30)
    mask = union_mask(pattern.index(view), view)
    expected = np.arange(len(view.is_visual)) <= view.rows[:, None]
    assert (mask == expected).all()
    assert MMInference.everything().local >= 1 << 30


def planted(
    rng: np.random.Generator, keys: int, stride: int, first: int, *, share: float, heads: int = 2
) -> torch.Tensor:
    """Column sums with lines of `share` of the mass, noise, and a few heavy keys."""
    sums = rng.gamma(0.5, size=(heads, keys)).astype(np.float32)
    lines = np.arange(first, keys, stride)
    sums[:, lines] += share / (1 - share) * sums.sum(1, keepdims=True) / len(lines) * rng.gamma(
        4.0, 0.25, (heads, len(lines))
    ).astype(np.float32)  # fmt: skip
    heavy = rng.integers(0, keys, 3)
    sums[:, heavy] += 0.05 * sums.sum(1, keepdims=True)
    return torch.from_numpy(sums)


def test_planted_grids_are_found() -> None:
    """Strides and places of lines that hold a third of the mass, on 200 maps; frames are known in half."""
    right = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        keys = int(rng.integers(2000, 9000))
        stride = int(rng.integers(16, min(1024, keys // 8)))
        first = int(rng.integers(stride))
        sums = planted(rng, keys, stride, first, share=0.33)
        frame = stride if seed % 2 else int(rng.integers(16, 1024))
        grids = find_grids(sums, frame, first=64, last=keys - 300, is_searched=np.ones(2, np.bool_))
        right += int((grids.stride == stride).all() and (grids.first == first).all())
    assert right >= 190


def test_noise_has_no_grid() -> None:
    rng = np.random.default_rng(3)
    sums = torch.from_numpy(rng.gamma(0.5, size=(16, 5000)).astype(np.float32))
    grids = find_grids(sums, 196, first=64, last=4700, is_searched=np.ones(16, np.bool_))
    assert (grids.lift < 0.1).all()


def test_frames_that_are_cut_off_do_not_count_as_frames() -> None:
    frame = np.repeat(np.array([0, -1, 1, 2, 3], np.int32), [9, 4, 9, 9, 5])
    assert frame_stride(frame, frame >= 0) == 9
    assert frame_stride(frame[9:13], frame[9:13] >= 0) is None


def grid_view(
    rng: np.random.Generator, stride: int, frames: int, *, gap: int, memory: PatternMemory | None = None
) -> ChunkView:
    """A clip with `gap` tokens of text behind each frame, whose heads look at one place of every frame."""
    frame = np.concatenate([[*[at] * stride, *[-1] * gap] for at in range(frames)]).astype(np.int32)
    view = view_of(rng, (frame >= 0, np.minimum(frame, 0), frame), width=16, memory=memory)
    place = np.cumsum(view.is_visual) - 1
    direction = torch.from_numpy(rng.choice([-1.5, 1.5], 16).astype(np.float32))
    view.keys[torch.from_numpy((place % stride == 5) & view.is_visual)] += direction
    view.queries[:] += direction
    return view


@pytest.mark.parametrize("gap", [0, 3])
def test_a_grid_in_the_prompt_is_found_between_text_and_seen(gap: int) -> None:
    rng = np.random.default_rng(4)
    view = grid_view(rng, 20, 20, gap=gap)
    pattern = MMInference(sink=4, local=32, vertical=4)
    index = pattern.index(view)
    check_index(index, torch.full((1, 2), len(view.is_visual)), q_heads=4)
    mask = union_mask(index, view)
    place = np.cumsum(view.is_visual) - 1
    lines = np.flatnonzero((place % 20 == 5) & view.is_visual)
    for row in np.flatnonzero(view.is_visual):
        assert mask[:, row, lines[lines <= row]].all()
    # rows on a line see everything before them
    assert mask[:, lines[-1], : lines[-1] + 1].all()
    assert mask.sum() < 0.5 * mask.shape[0] * len(place) * (len(place) + 1) / 2


def test_a_head_without_a_grid_takes_the_heaviest_keys() -> None:
    rng = np.random.default_rng(5)
    view = grid_view(rng, 20, 20, gap=0)
    view.keys[:] = torch.from_numpy(rng.standard_normal(view.keys.shape).astype(np.float32)) / 4
    view.keys[[50, 117]] += 2 * view.queries[:, 0].mean(0)
    view.values[[50, 117]] += 3
    index = MMInference(sink=4, local=32, vertical=2).index(view)
    assert union_mask(index, view)[0, -1, [50, 117]].all()
    assert not union_mask(index, view)[0, -1, 60]


def test_where_weights_show_no_grid_the_outputs_decide() -> None:
    """A head that looks at all keys alike: one class has their mean value, and others do not."""
    rng = np.random.default_rng(12)
    view = grid_view(rng, 20, 30, gap=0)
    view.keys[:] = 0
    view.values[:] = torch.from_numpy(rng.choice([-9.0, 9.0], (600, 2, 16)).astype(np.float32))
    mean = view.values.mean(0)
    view.values[13::20] = mean
    mask = union_mask(MMInference(sink=0, local=8, vertical=2).index(view), view)
    assert mask[:, -1, 13:500:20].all()
    assert not mask[:, -1, 5:500:20].any()


def test_groups_of_heads_choose_on_their_own() -> None:
    rng = np.random.default_rng(6)
    view = grid_view(rng, 20, 20, gap=0)
    view.queries[:, 1] *= -1
    found = find_lines(view, gather(view.is_visual), MMInference(sink=4, local=32).heads_of(view), 0.1)
    places = [(int(found["vision"].stride[head]), int(found["vision"].first[head])) for head in range(4)]
    assert places[0] == places[2] == places[3] == (20, 5)
    assert places[1] != (20, 5)


def test_a_chunk_sees_earlier_slots_by_lines_that_were_found_before() -> None:
    """In chunks the same lines are kept, found again as the prompt grows."""
    memory: PatternMemory = {}
    rng = np.random.default_rng(7)
    whole = grid_view(rng, 20, 30, gap=0)
    pattern = MMInference(sink=4, local=32, vertical=4)
    lines = np.arange(5, 600, 20)
    for start, stop in pairwise([0, 200, 380, 410, 600]):
        view = ChunkView(
            layer=0,
            layers=1,
            queries=whole.queries[start:stop],
            keys=whole.keys[:stop],
            values=whole.values[:stop],
            rows=whole.rows[start:stop],
            is_visual=whole.is_visual[:stop],
            item=whole.item[:stop],
            frame=whole.frame[:stop],
            tile_rows=32,
            memory=memory,
        )
        index = pattern.index(view)
        check_index(index, torch.full((1, 2), stop), q_heads=4)
        mask = union_mask(index, view)
        assert all(mask[:, row - start, lines[lines <= row]].all() for row in range(start, stop))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_outputs_are_those_of_dense_attention_under_the_mask(boundary: str) -> None:
    rng = np.random.default_rng(8)
    view = view_of(rng, layout(rng, 3, 30), width=16, start=11)
    pattern = MMInference(sink=2, local=8, vertical=3, min_lift=0.0, boundary=boundary)
    index = pattern.index(view)
    found = prefill_attention(view.queries, view.keys, view.values, index, scale=view.scale)
    scores = torch.einsum("nhd,shd->hns", view.queries, view.keys.repeat_interleave(2, 1)) * view.scale
    scores.masked_fill_(~torch.from_numpy(union_mask(index, view)), -torch.inf)
    expected = torch.einsum("hns,shd->nhd", scores.softmax(-1), view.values.repeat_interleave(2, 1))
    torch.testing.assert_close(found.out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lse, scores.logsumexp(-1).T, atol=1e-5, rtol=1e-5)


def test_trailing_rows_may_be_missing() -> None:
    rng = np.random.default_rng(9)
    parts = layout(rng, 3, 12)
    view = view_of(rng, parts)
    view = view_of(rng, parts, stop=len(parts[0]) - 4) if len(parts[0]) > 8 else view
    index = index_of(view, [random_head(rng)] * 4, 0.1)
    check_index(index, torch.full((1, 2), len(view.is_visual)), q_heads=4)


@pytest.mark.parametrize(
    "settings",
    [{"local": 0}, {"sink": -1}, {"boundary": "x"}, {"min_lift": 2}, {"vertical": -1}, {"sink": 1.5}],
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match="Expected"):
        MMInference(**settings)  # type: ignore[arg-type]  # wrong on purpose


def test_one_head_of_a_profile_may_do_something_else() -> None:
    rng = np.random.default_rng(10)
    view = view_of(rng, layout(rng, 2, 30))
    narrow, wide = Lines(sink=1, local=2), Lines(sink=0, local=1000)
    heads = [
        Head(boundary="k", vision=each, text=each, vision_to_text=each, text_to_vision=each)
        for each in (narrow, wide, narrow, wide)
    ]
    mask = union_mask(index_of(view, heads, 0.1), view)
    assert mask[1].sum() > mask[0].sum()
    assert (mask[1] == mask[3]).all()


def test_a_head_tells_what_it_does() -> None:
    view = grid_view(np.random.default_rng(11), 20, 20, gap=0)
    assert MMInference(sink=4, local=32).of_head(view, 0) == "grid of 20, 2D-boundary"
    few = view_of(np.random.default_rng(12), (view.is_visual[:8], view.item[:8], view.frame[:8]))
    assert MMInference(boundary="k").of_head(few, 0) == "vertical-slash, K-boundary"
