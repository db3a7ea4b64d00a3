"""What one media item may cost. Knows nothing about how the limits are enforced."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmserve.errors import ConfigError, MediaError

if TYPE_CHECKING:  # the decoding process has no use for a deployment's configuration
    from mmserve.config import Limits, VideoBackend

DEFAULT_FRAMES = 32
_LIBRARIES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Budgets of a single item. Every `max_` is inclusive; sides and pixels are of one frame.

    `max_total_pixels` sums the sampled frames of an item, `max_decoded_bytes` bounds one decode call and
    `max_ahead_bytes` what is decoded before it is taken, of all items of a worker. The `process_` values
    bound the decoder's own process, its memory beyond what its libraries occupy; `video_backend` decodes
    videos there.
    """

    max_image_bytes: int = 20_000_000
    max_image_fetch_s: float = 5.0
    max_video_bytes: int = 100_000_000
    max_video_fetch_s: float = 30.0
    min_side: int = 1
    max_side: int = 16_384
    max_pixels: int = 33_500_000
    max_aspect: float = 200.0
    default_frames: int = DEFAULT_FRAMES
    max_frames: int = 2_048
    max_total_pixels: int = 4_000_000_000
    max_duration_s: float = 14_400.0
    max_source_frames: int = 500_000
    max_decoded_bytes: int = 1 << 30
    max_ahead_bytes: int = 1 << 28
    video_backend: str = "pyav"
    decode_threads: int = 1
    process_memory_bytes: int = 4 << 30
    process_open_files: int = 64
    process_jobs: int = 200
    job_cpu_s: int = 60
    job_deadline_s: float = 60.0
    start_deadline_s: float = 20.0

    @classmethod
    def from_config(cls, limits: Limits, video_backend: VideoBackend = "pyav") -> MediaLimits:
        """The part of a deployment's limits that concerns one item."""
        if find_spec(_LIBRARIES[video_backend]) is None:
            raise ConfigError(f"Expected a video_backend that is installed, but got {video_backend}")
        return cls(
            max_image_bytes=limits.max_image_bytes,
            max_image_fetch_s=limits.max_image_fetch_s,
            max_video_bytes=limits.max_video_bytes,
            max_video_fetch_s=limits.max_video_fetch_s,
            min_side=limits.min_side,
            max_side=limits.max_side,
            max_pixels=limits.max_pixels,
            max_aspect=limits.max_aspect,
            default_frames=limits.default_frames,
            max_frames=limits.max_frames,
            max_total_pixels=limits.max_total_pixels,
            max_duration_s=limits.max_duration_s,
            job_deadline_s=limits.job_deadline_s,
            video_backend=video_backend,
        )

    def max_bytes(self, modality: str) -> int:
        return self.max_image_bytes if modality == "image" else self.max_video_bytes

    def max_fetch_s(self, modality: str) -> float:
        return self.max_image_fetch_s if modality == "image" else self.max_video_fetch_s

    def check_size(self, width: int, height: int) -> None:
        """Raise for a picture whose header promises too little or too much."""
        size = f"{width}x{height}"
        short, long = min(width, height), max(width, height)
        if short < self.min_side:
            raise MediaError(f"Expected media sides of at least {self.min_side} pixels, but got {size}")
        if long > self.max_side:
            raise MediaError(f"Expected media sides of at most {self.max_side} pixels, but got {size}")
        if width * height > self.max_pixels:
            raise MediaError(f"Expected at most {self.max_pixels} pixels per frame, but got {size}")
        if long > short * self.max_aspect:
            raise MediaError(f"Expected an aspect ratio of at most {self.max_aspect:g}, but got {size}")

    def check_animation(self, count: int, width: int, height: int) -> None:
        """Raise for frames that paint over those before, so that all are decoded whatever is sampled."""
        if (painted := count * width * height) > self.max_total_pixels:
            raise MediaError(
                f"Expected an animation of at most {self.max_total_pixels} pixels over all frames, "
                f"but got {painted} ({count} frames of {width}x{height})"
            )

    def check_frames(self, count: int, width: int, height: int) -> None:
        """Raise when the sampled frames of one item are too many, alone or by their pixels."""
        if count > self.max_frames:
            raise MediaError(f"Expected at most {self.max_frames} sampled frames, but got {count}")
        total = count * width * height
        if total > self.max_total_pixels:
            raise MediaError(
                f"Expected at most {self.max_total_pixels} pixels over all sampled frames, "
                f"but got {total} ({count} frames of {width}x{height})"
            )
