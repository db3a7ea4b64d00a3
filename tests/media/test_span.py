"""A part of a video is planned, not cut: `start_s` and `end_s` choose among the media's own frames."""

from __future__ import annotations

import numpy as np
import pytest

from mmserve.errors import BadRequest, MediaError
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import check_options, sample
from mmserve.request import MediaOptions

TIMES = np.arange(16) / 4  # 4 s at 4 frames per second
LIMITS = MediaLimits()


def chosen(**options: float | int | None) -> list[int]:
    span = MediaOptions(**options)  # type: ignore[arg-type]
    return [int(index) for index in sample(TIMES, 4.0, 0.001, span, LIMITS)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start_s": 1.0, "end_s": 2.0}, [4, 5, 6, 7]),
        ({"end_s": 1.0}, [0, 1, 2, 3]),
        ({"start_s": 3.0}, [12, 13, 14, 15]),
        ({"num_frames": 4}, [0, 4, 8, 12]),
        ({"start_s": 1.0, "end_s": 3.0, "num_frames": 2}, [4, 8]),
        ({"start_s": 0.4, "end_s": 2.6, "fps": 1.0}, [4, 8]),
        ({"start_s": 0.6, "end_s": 0.8}, [3]),
        ({"start_s": 0.6, "end_s": 0.8, "fps": 1.0}, [3]),
    ],
)
def test_frames_within_the_span(options: dict[str, float | int | None], expected: list[int]) -> None:
    assert chosen(**options) == expected


def test_overlapping_spans_at_one_rate_share_their_frames() -> None:
    first, second = chosen(end_s=2.5, fps=2.0), chosen(start_s=1.5, fps=2.0)
    assert set(first) & set(second) == {index for index in first if TIMES[index] >= 1.5}


def test_nothing_within_the_span() -> None:
    with pytest.raises(MediaError, match="from 9 s"):
        chosen(start_s=9.0)


@pytest.mark.parametrize("span", [{"start_s": -1.0}, {"start_s": 2.0, "end_s": 2.0}])
def test_impossible_spans_are_refused(span: dict[str, float]) -> None:
    with pytest.raises(BadRequest, match="start"):
        check_options(MediaOptions(**span), LIMITS)  # type: ignore[arg-type]
