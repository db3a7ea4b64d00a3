"""Temporal segmentation and quotas against their definitions, in whole numbers. Needs no torch."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmserve.pruning.quotas import exact_quotas
from mmserve.pruning.segmentation import Bools, Ints, Segments, merge_gains, run_lengths, segment_frames


def _links(seed: int, frames: int, tokens: int, density: float) -> Bools:
    return np.random.default_rng(seed).random((frames - 1, tokens)) < density


def _gain(links: Bools, first: int, last: int) -> int:
    return (last - first) * int(links[first:last].all(axis=0).sum()) if last > first else 0


def _exhaustive(links: Bools, max_segments: int) -> int:
    frames = len(links) + 1
    best = -1
    for cuts in range(min(max_segments, frames)):
        for inner in combinations(range(1, frames), cuts):
            edges = [0, *inner, frames]
            best = max(best, sum(_gain(links, a, b - 1) for a, b in pairwise(edges)))
    return best


def _check(segments: Segments, links: Bools) -> None:
    frames = len(links) + 1
    assert segments.starts[0] == 0
    assert segments.stops[-1] == frames
    assert (segments.starts[1:] == segments.stops[:-1]).all()
    assert (segments.starts < segments.stops).all()
    for start, stop, static in zip(segments.starts, segments.stops, segments.static, strict=True):
        expected = links[start : stop - 1].all(axis=0) & (stop - start > 1)
        assert (static == expected).all()


@given(seed=st.integers(0, 2**32), frames=st.integers(1, 12), tokens=st.integers(1, 9), dense=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_run_length_gains_equal_the_definition(seed: int, frames: int, tokens: int, dense: float) -> None:
    links = _links(seed, frames, tokens, dense)
    gains = merge_gains(run_lengths(links))
    for first in range(frames):
        for last in range(first, frames):
            assert gains[first, last] == _gain(links, first, last)
        assert (gains[first, :first] < 0).all()


@given(
    seed=st.integers(0, 2**32),
    frames=st.integers(1, 8),
    tokens=st.integers(1, 6),
    dense=st.floats(0.2, 1),
    limit=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_segmentation_saves_as_much_as_exhaustive_search(
    seed: int, frames: int, tokens: int, dense: float, limit: int
) -> None:
    links = _links(seed, frames, tokens, dense)
    segments = segment_frames(links, limit)
    _check(segments, links)
    assert len(segments.starts) <= limit
    assert segments.removed == _exhaustive(links, limit)


def test_identical_frames_are_one_segment() -> None:
    segments = segment_frames(np.ones((9, 5), dtype=np.bool_), 100)
    assert segments.starts.tolist() == [0]
    assert segments.static.all()
    assert segments.removed == 9 * 5


def test_frames_without_links_stay_alone() -> None:
    segments = segment_frames(np.zeros((9, 5), dtype=np.bool_), 100)
    assert segments.starts.tolist() == list(range(10))
    assert segments.removed == 0
    assert segments.of_frame.tolist() == list(range(10))


def test_one_frame_is_one_segment() -> None:
    segments = segment_frames(np.zeros((0, 5), dtype=np.bool_), 1)
    assert segments.starts.tolist() == [0]
    assert not segments.static.any()


def test_a_cut_through_the_whole_picture_ends_a_segment() -> None:
    links = np.ones((7, 4), dtype=np.bool_)
    links[3] = False
    assert segment_frames(links, 100).starts.tolist() == [0, 4]


def test_a_single_static_position_does_not_outweigh_a_pair_of_full_segments() -> None:
    links = np.ones((3, 4), dtype=np.bool_)
    links[1, 1:] = False
    # one segment saves 3 tokens, two pairs save 8
    assert segment_frames(links, 100).starts.tolist() == [0, 2]


@st.composite
def _groups(draw: st.DrawFn) -> tuple[Ints, Ints, int]:
    """A static group and the frames' dynamic ones per segment, as a grid of N tokens gives them."""
    tokens = draw(st.integers(1, 20))
    sizes, segment = [], []
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    for index, length in enumerate(lengths):
        static = draw(st.integers(0, tokens)) if length > 1 else 0
        sizes += [static] + [tokens - static] * length
        segment += [index] * (length + 1)
    budget = draw(st.integers(len(lengths), sum(sizes)))
    return np.array(sizes, dtype=np.int64), np.array(segment, dtype=np.int64), budget


@given(_groups())
@settings(max_examples=300, deadline=None)
def test_quotas_are_exact_capped_and_leave_no_segment_empty(groups: tuple[Ints, Ints, int]) -> None:
    sizes, segment, budget = groups
    quotas = exact_quotas(sizes, segment, budget)
    assert quotas.sum() == budget
    assert ((quotas >= 0) & (quotas <= sizes)).all()
    assert (np.bincount(segment, weights=quotas) >= 1).all()
    # never a whole token away from the proportional share
    assert (np.abs(quotas - sizes * budget / sizes.sum()) < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [([5, 5, 5], 4, [2, 1, 1]), ([1, 6, 3], 5, [1, 3, 1]), ([4, 4], 8, [4, 4]), ([0, 7], 3, [0, 3])],
)
def test_quotas_go_by_largest_fraction_then_lower_index(
    sizes: list[int], budget: int, expected: list[int]
) -> None:
    quotas = exact_quotas(np.array(sizes), np.zeros(len(sizes), dtype=np.int64), budget)
    assert quotas.tolist() == expected
