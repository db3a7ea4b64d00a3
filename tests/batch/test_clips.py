"""Cutting a part of a video into frames."""

from __future__ import annotations

import numpy as np
import pytest

from mmserve.batch.clips import cut, cut_all
from mmserve.errors import BadRequest, MediaError
from mmserve.evaluation.clipworld import write_mp4
from mmserve.media.limits import MediaLimits
from mmserve.request import MediaOptions


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """4 s at 4 frames per second; frame i is grey level 10 i."""
    frames = np.repeat(np.arange(16, dtype=np.uint8) * 10, 32 * 32 * 3).reshape(16, 32, 32, 3)
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_mp4(frames, path, 4)
    return str(path)


def shown(part: dict[str, object]) -> list[int]:
    frames = part["video"]
    assert isinstance(frames, np.ndarray)
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("span", "options", "expected"),
    [
        ((1.0, 2.0), MediaOptions(), [4, 5, 6, 7]),
        ((0.0, 1.0), MediaOptions(), [0, 1, 2, 3]),
        ((3.0, None), MediaOptions(), [12, 13, 14, 15]),
        ((0.0, None), MediaOptions(num_frames=4), [0, 4, 8, 12]),
        ((1.0, 3.0), MediaOptions(num_frames=2), [4, 8]),
        ((0.4, 2.6), MediaOptions(fps=1), [4, 8]),
        ((0.6, 0.8), MediaOptions(), [3]),
    ],
)
def test_frames_within_the_span(
    clip: str, span: tuple[float, float | None], options: MediaOptions, expected: list[int]
) -> None:
    assert shown(cut(clip, span, options)) == expected


def test_the_rate_is_that_of_the_frames_taken(clip: str) -> None:
    assert cut(clip, (1.0, 3.0), MediaOptions(num_frames=4))["fps"] == pytest.approx(2)


def test_nothing_within_the_span(clip: str) -> None:
    with pytest.raises(BadRequest, match="from 9 s"):
        cut(clip, (9.0, None), MediaOptions())


def test_limits_hold_for_what_is_taken(clip: str) -> None:
    limits = MediaLimits(max_frames=4, max_total_pixels=4 * 32 * 32)
    assert len(shown(cut(clip, (0.0, 1.0), MediaOptions(), limits))) == 4
    with pytest.raises(MediaError):
        cut(clip, (0.0, 2.0), MediaOptions(), limits)


def test_only_videos_are_cut(clip: str) -> None:
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "video", "video": clip},
        {"type": "text", "text": "x"},
    ]
    (message,) = cut_all(({"role": "user", "content": content},), (0.0, 1.0), MediaOptions())
    assert message["content"][0] == content[0]
    assert isinstance(message["content"][1]["video"], np.ndarray)
    with pytest.raises(BadRequest, match="URL"):
        cut_all(
            ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "https://h"}}]},),
            (0.0, 1.0),
            MediaOptions(),
        )
