"""Reads OpenAI chat messages: checks their shape, and separates media from what the template renders.

Knows nothing about fetching, tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmserve.errors import BadRequest
from mmserve.request import MediaOptions, Modality

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class MediaPart:
    """One media item of a conversation, still where its sender left it.

    `content` is a URL or, for callers on this host, a path, a PIL image or a uint8 array.
    """

    modality: Modality
    content: Any
    options: MediaOptions = field(default_factory=MediaOptions)
    fps: float | None = None  # of an array


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the chat template takes them, and their media in order of appearance."""

    messages: tuple[dict[str, Any], ...]
    media: tuple[MediaPart, ...]


def parse(
    messages: object,
    *,
    options: MediaOptions | None = None,
    max_messages: int = 256,
    max_parts: int = 64,
    on_this_host: bool = False,
) -> Conversation:
    """Check and separate. With `on_this_host`, parts of type "image" and "video" are allowed too.

    Raises BadRequest that names the message and what was expected of it.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRequest(f"Expected messages as a list of at least one message, but got {_kind(messages)}")
    if len(messages) > max_messages:
        raise BadRequest(f"Expected at most {max_messages} messages, but got {len(messages)}")
    media: list[MediaPart] = []
    parsed = [
        _message(message, number, media, options or MediaOptions(), max_parts, on_this_host)
        for number, message in enumerate(messages)
    ]
    return Conversation(tuple(parsed), tuple(media))


def _message(
    message: object,
    number: int,
    media: list[MediaPart],
    options: MediaOptions,
    max_parts: int,
    on_this_host: bool,
) -> dict[str, Any]:
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
    if len(content) > max_parts:
        raise BadRequest(f"Expected at most {max_parts} parts in {where}, but got {len(content)}")
    parts = []
    for index, part in enumerate(content):
        parts.append(_part(part, f"{where}.content[{index}]", media, options, on_this_host))
    return {"role": role, "content": parts}


def _part(
    part: object, where: str, media: list[MediaPart], options: MediaOptions, on_this_host: bool
) -> dict[str, str]:
    if not isinstance(part, Mapping):
        raise BadRequest(f"Expected {where} as an object, but got {_kind(part)}")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise BadRequest(f"Expected {where}.text as text, but got {_kind(text)}")
        _check_text(text, f"{where}.text")
        return {"type": "text", "text": text}
    if kind in ("image_url", "video_url"):
        value = part.get(kind)
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not url:
            raise BadRequest(f"Expected {where}.{kind}.url as a URL, but got {_kind(url)}")
        media.append(MediaPart("image" if kind == "image_url" else "video", url, options))
    elif kind in ("image", "video") and on_this_host:
        content = part.get(kind)
        if content is None:
            raise BadRequest(f"Expected {where}.{kind} as a path, image or array, but got nothing")
        media.append(MediaPart("image" if kind == "image" else "video", content, options, part.get("fps")))
    else:
        known = "text, image_url, video_url" + (", image, video" if on_this_host else "")
        raise BadRequest(f"Expected {where}.type as one of {known}, but got {_shown(kind)}")
    return {"type": media[-1].modality}


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
