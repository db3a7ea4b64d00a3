"""Limits of one item: exactly at the border is allowed, one beyond is not."""

from __future__ import annotations

import pytest

from mmserve.config import Limits
from mmserve.errors import MediaError
from mmserve.media.limits import MediaLimits


@pytest.mark.parametrize(
    ("inside", "outside", "limits"),
    [
        ((4, 4), (3, 4), MediaLimits(min_side=4)),
        ((100, 10), (101, 10), MediaLimits(max_side=100)),
        ((10, 10), (101, 1), MediaLimits(max_pixels=100)),
        ((20, 2), (21, 2), MediaLimits(max_aspect=10)),
        ((2, 20), (2, 21), MediaLimits(max_aspect=10)),
    ],
)
def test_sizes_at_the_border(inside: tuple[int, int], outside: tuple[int, int], limits: MediaLimits) -> None:
    limits.check_size(*inside)
    with pytest.raises(MediaError, match=f"got {outside[0]}x{outside[1]}"):
        limits.check_size(*outside)


def test_frames_at_the_border() -> None:
    limits = MediaLimits(max_frames=10, max_total_pixels=1000)
    limits.check_frames(10, 10, 10)
    with pytest.raises(MediaError, match="at most 10 sampled frames, but got 11"):
        limits.check_frames(11, 1, 1)
    with pytest.raises(MediaError, match=r"at most 1000 pixels over all sampled frames, but got 1100"):
        limits.check_frames(10, 11, 10)


def test_a_deployment_s_limits_arrive() -> None:
    configured = Limits(max_frames=7, default_frames=7, min_side=2, job_deadline_s=3.0)
    limits = MediaLimits.from_config(configured)
    assert (limits.max_frames, limits.min_side, limits.job_deadline_s) == (7, 2, 3.0)
    assert MediaLimits.from_config(Limits(min_side=1)) == MediaLimits()


def test_budgets_depend_on_the_modality() -> None:
    limits = MediaLimits()
    assert (limits.max_bytes("image"), limits.max_fetch_s("image")) == (20_000_000, 5.0)
    assert (limits.max_bytes("video"), limits.max_fetch_s("video")) == (100_000_000, 30.0)
