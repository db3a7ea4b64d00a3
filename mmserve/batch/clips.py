"""Cuts the part of a video that a row asks about, as sampled frames.

Knows nothing about rows or models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mmserve.errors import BadRequest, MediaError
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MAX_FPS, sample_count
from mmserve.media.video import decode_frames, plan_video
from mmserve.request import MediaOptions

Span = tuple[float, float | None]  # seconds: from, and up to but without


def cut(path: str, span: Span, options: MediaOptions, limits: MediaLimits | None = None) -> dict[str, Any]:
    """A content part with the frames shown within `span`, sampled as `options` say.

    `fps` takes times of the media's own clock, wherever the span begins.
    """
    limits = limits or MediaLimits()
    every = options if options.fps is not None else MediaOptions(fps=MAX_FPS)
    # listing all frames decodes none of them; what is decoded is checked below
    listing = replace(limits, max_frames=limits.max_source_frames, max_total_pixels=1 << 62)
    plan = plan_video(path, every, listing)
    start, end = span
    inside = [i for i, time in enumerate(plan.times_s) if start <= time and (end is None or time < end)]
    if not inside:
        raise BadRequest(f"Expected frames from {start:g} s, but the video ends after {plan.duration_s:g} s")
    if options.fps is None:
        picked = sample_count(len(inside), options.num_frames or limits.default_frames)
        inside = [inside[index] for index in picked.tolist()]
    limits.check_frames(len(inside), plan.width, plan.height)
    frames = [frame for _, frame in decode_frames(path, plan, inside, limits)]
    if not frames:
        raise MediaError("Expected at least one frame that decodes, but every one is broken")
    times = [plan.times_s[index] for index in inside]
    spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return {"type": "video", "video": np.stack(frames), "fps": 1 / spacing if spacing > 0 else 1.0}


def cut_all(messages: tuple[dict[str, Any], ...], span: Span, options: MediaOptions) -> list[dict[str, Any]]:
    """The same messages with every video replaced by the part within `span`."""
    return [
        {**message, "content": [_cut_part(part, span, options) for part in message["content"]]}
        for message in messages
    ]


def _cut_part(part: dict[str, Any], span: Span, options: MediaOptions) -> dict[str, Any]:
    if part["type"] == "video_url":
        raise BadRequest("Expected a video file for start and end, but got a URL")
    return cut(part["video"], span, options) if part["type"] == "video" else part
