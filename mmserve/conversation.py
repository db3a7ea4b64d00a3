"""Reads OpenAI chat messages: checks their shape, and separates media from what the template renders.

Knows nothing about fetching, tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmserve.errors import BadRequest
from mmserve.media.plan import MAX_FPS
from mmserve.request import MediaOptions, Modality

ROLES = ("system", "user", "assistant")
MAX_UUID_CHARS = 512


@dataclass(frozen=True, slots=True)
class MediaPart:
    """One media item of a conversation, still where its sender left it.

    `content` is a URL, a tuple of them for the frames of a video, or, for callers on this host, paths, PIL
    images and uint8 arrays too. It is None for an item that was sent before under the same `uuid`.
    """

    modality: Modality
    content: Any
    options: MediaOptions = field(default_factory=MediaOptions)
    fps: float | None = None  # of an array or a list of frames
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the chat template takes them, and their media in order of appearance."""

    messages: tuple[dict[str, Any], ...]
    media: tuple[MediaPart, ...]


@dataclass(frozen=True, slots=True)
class _Rules:
    """How parts of media are read."""

    options: MediaOptions
    max_parts: int
    max_frames: int
    on_this_host: bool


def parse(
    messages: object,
    *,
    options: MediaOptions | None = None,
    max_messages: int = 256,
    max_parts: int = 64,
    max_frames: int = 2048,
    on_this_host: bool = False,
) -> Conversation:
    """Check and separate. With `on_this_host`, parts of type "image" and "video" may hold more than URLs.

    Raises BadRequest that names the message and what was expected of it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRequest(f"Expected messages as a list of at least one message, but got {_kind(messages)}")
    if len(messages) > max_messages:
        raise BadRequest(f"Expected at most {max_messages} messages, but got {len(messages)}")
    media: list[MediaPart] = []
    rules = _Rules(options or MediaOptions(), max_parts, max_frames, on_this_host)
    parsed = [_message(message, number, media, rules) for number, message in enumerate(messages)]
    return Conversation(tuple(parsed), tuple(media))


def _message(message: object, number: int, media: list[MediaPart], rules: _Rules) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise BadRequest(f"Expected {where} as an object, but got {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRequest(f"Expected {where}.role as one of {', '.join(ROLES)}, but got {_shown(role)}")
    if isinstance(content, str):
        if not content.strip():
            raise BadRequest(f"Expected {where}.content with text or media, but it is empty")
        _check_text(content, f"{where}.content")
        return {"role": role, "content": content}
    if not isinstance(content, Sequence) or not content:
        raise BadRequest(f"Expected {where}.content as text or a list of parts, but got {_kind(content)}")
    if len(content) > rules.max_parts:
        raise BadRequest(f"Expected at most {rules.max_parts} parts in {where}, but got {len(content)}")
    parts = []
    for index, part in enumerate(content):
        parts.append(_part(part, f"{where}.content[{index}]", media, rules))
    return {"role": role, "content": parts}


def _part(part: object, where: str, media: list[MediaPart], rules: _Rules) -> dict[str, str]:
    if not isinstance(part, Mapping):
        raise BadRequest(f"Expected {where} as an object, but got {_kind(part)}")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise BadRequest(f"Expected {where}.text as text, but got {_kind(text)}")
        _check_text(text, f"{where}.text")
        return {"type": "text", "text": text}
    known = ("image_url", "video_url", "video", *(("image",) if rules.on_this_host else ()))
    if not isinstance(kind, str) or kind not in known:
        raise BadRequest(f"Expected {where}.type as one of text, {', '.join(known)}, but got {_shown(kind)}")
    _check_keys(part, {"type", kind, "fps", "uuid"}, where)
    uuid = checked_uuid(part.get("uuid"), f"{where}.uuid")
    read = _url if kind in ("image_url", "video_url") else _content
    item = MediaPart(
        "image" if kind in ("image_url", "image") else "video",
        read(part, kind, where, rules, is_optional=uuid is not None),
        rules.options,
        checked_fps(part.get("fps"), f"{where}.fps"),
        uuid,
    )
    media.append(item)
    return {"type": item.modality}


def _url(part: Mapping[str, Any], kind: str, where: str, rules: _Rules, *, is_optional: bool) -> str | None:
    value = part.get(kind)
    if isinstance(value, Mapping):
        # OpenAI's level of detail: every image is seen in full here
        _check_keys(value, {"url", "detail"}, f"{where}.{kind}")
        value = value.get("url")
    url = value
    if url is None and is_optional:
        return None
    if not isinstance(url, str) or not url:
        raise BadRequest(f"Expected {where}.{kind}.url as a URL, but got {_kind(url)}")
    return url


def _content(
    part: Mapping[str, Any], kind: str, where: str, rules: _Rules, *, is_optional: bool
) -> object | None:
    content: object = part.get(kind)
    if content is None and is_optional:
        return None
    if kind == "video" and isinstance(content, list | tuple):
        return _frames(content, f"{where}.video", rules)
    if not rules.on_this_host:
        raise BadRequest(
            f"Expected {where}.video as a list of image URLs, the frames, but got {_kind(content)}: "
            "one URL of a video is a video_url"
        )
    if content is None:
        raise BadRequest(f"Expected {where}.{kind} as a path, image or array, but got nothing")
    return content


def _frames(frames: Sequence[object], where: str, rules: _Rules) -> tuple[object, ...]:
    if not 1 <= len(frames) <= rules.max_frames:
        raise BadRequest(
            f"Expected {where} as a list of 1 to {rules.max_frames} frames, but got {len(frames)}"
        )
    for number, frame in enumerate(frames):
        is_url = isinstance(frame, str) and frame
        if not is_url and (not rules.on_this_host or frame is None or isinstance(frame, str | list | tuple)):
            expected = "a path, image or array" if rules.on_this_host else "the URL of an image"
            raise BadRequest(f"Expected {where}[{number}] as {expected}, but got {_kind(frame)}")
    return tuple(frames)


def checked_fps(fps: object, where: str) -> float | None:
    """The rate of frames that come one by one; a video file has its own."""
    if fps is None:
        return None
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= MAX_FPS:
        raise BadRequest(f"Expected {where} above 0 and at most {MAX_FPS:g}, but got {_shown(fps)}")
    return float(fps)


def checked_uuid(uuid: object, where: str) -> str | None:
    """The name under which a client finds its media again."""
    if uuid is None:
        return None
    if not isinstance(uuid, str) or not 1 <= len(uuid) <= MAX_UUID_CHARS:
        raise BadRequest(f"Expected {where} as text of 1 to {MAX_UUID_CHARS} characters")
    _check_text(uuid, where)
    return uuid


def _check_keys(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """What would be ignored is refused, since whoever wrote it meant something by it."""
    for key in given:
        if key not in known:
            hint = " (how media are sampled is said in media_io_kwargs)" if where.endswith("]") else ""
            raise BadRequest(f"Expected {where} with {', '.join(sorted(known))}, but got {_shown(key)}{hint}")


def _check_text(text: str, where: str) -> None:
    """JSON may spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"Expected {where} as Unicode text, but it has a lone surrogate") from error


def _shown(value: object) -> str:
    """A client's own value, cut so that it cannot flood a reply or a log."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
