"""`media_io_kwargs`: how videos are sampled, by vLLM's names. Knows nothing about media or HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from mmserve.errors import BadRequest
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import check_options
from mmserve.request import MediaOptions

# their names there and ours
_FIELDS: dict[str, tuple[str, type, str]] = {
    "num_frames": ("num_frames", int, "a whole number"),
    "fps": ("fps", float, "a number"),
    "start": ("start_s", float, "a number"),
    "end": ("end_s", float, "a number"),
    "max_pixels": ("max_pixels", int, "a whole number"),
    "keyframes": ("keyframes_only", bool, "true or false"),
}


def media_options(given: object, default: MediaOptions | None = None) -> MediaOptions:
    """Read `{"video": {"num_frames": 16}}`; what it does not say is as in `default`.

    `num_frames` and `fps` exclude each other, so one that is given takes the other's place.
    """
    known = {name: getattr(default or MediaOptions(), name) for name, _, _ in _FIELDS.values()}
    for field, value in _video(given).items():
        if field not in _FIELDS:
            names = ", ".join(_FIELDS)
            raise BadRequest(f"Expected media_io_kwargs.video with {names}, but got {str(field)[:40]!r}")
        name, kind, expected = _FIELDS[field]
        if value is None:
            continue
        takes = (int, float) if kind is float else kind
        if not isinstance(value, takes) or (isinstance(value, bool) and kind is not bool):
            raise BadRequest(
                f"Expected media_io_kwargs.video.{field} as {expected}, but got {type(value).__name__}"
            )
        known[name] = kind(value)
        if field in ("num_frames", "fps"):
            other = "fps" if field == "num_frames" else "num_frames"
            known[other] = _video(given).get(other)
    options = MediaOptions(**known)
    check_options(options, MediaLimits())
    return options


def media_io_kwargs(options: MediaOptions) -> dict[str, dict[str, object]]:
    """The same in the other direction: what differs from the defaults."""
    default = MediaOptions()
    changed = {
        field: getattr(options, name)
        for field, (name, _, _) in _FIELDS.items()
        if getattr(options, name) != getattr(default, name)
    }
    return {"video": changed} if changed else {}


def _video(given: object) -> Mapping[str, object]:
    if not isinstance(given, Mapping):
        raise BadRequest(f"Expected media_io_kwargs as an object, but got {type(given).__name__}")
    for kind, fields in given.items():
        if kind not in ("image", "video") or not isinstance(fields, Mapping):
            raise BadRequest("Expected media_io_kwargs with an object video, but got something else")
        if kind == "image" and fields:
            raise BadRequest("Expected media_io_kwargs.image to be empty: images have no options")
    video = given.get("video", {})
    assert isinstance(video, Mapping)
    return video
