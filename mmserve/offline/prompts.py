"""What a caller in Python asks, as token ids and media: OpenAI conversations and vLLM's prompts.

Knows nothing about fetching, and nothing about requests once they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

from mmserve.conversation import MediaPart, checked_fps, checked_uuid, parse
from mmserve.errors import BadRequest
from mmserve.media.framelist import DEFAULT_FPS
from mmserve.models.chat import ChatFormat
from mmserve.request import MediaOptions, Modality

Messages: TypeAlias = Sequence[Mapping[str, Any]]
# text, {"prompt": text} or {"prompt_token_ids": ids}; the last two with "multi_modal_data" or without
PromptInput: TypeAlias = str | Mapping[str, Any]

_FIELDS = ("prompt", "prompt_token_ids", "multi_modal_data", "multi_modal_uuids")


class Inputs(NamedTuple):
    """Token ids with one placeholder per media item, and the items in that order."""

    token_ids: tuple[int, ...]
    media: tuple[MediaPart, ...]


def conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """A list of messages is one conversation, a list of such lists several."""
    if not messages or isinstance(messages[0], Mapping):
        return [cast("Messages", messages)]
    return list(cast("Sequence[Messages]", messages))


def prompts(given: PromptInput | Sequence[PromptInput]) -> list[PromptInput]:
    return [given] if isinstance(given, str | Mapping) else list(given)


def read_messages(messages: Messages, chat: ChatFormat, options: MediaOptions) -> Inputs:
    """A conversation through the model's chat template."""
    conversation = parse(messages, options=options, on_this_host=True)
    return Inputs(tuple(chat.encode(conversation.messages)), conversation.media)


def read_prompt(prompt: PromptInput, chat: ChatFormat, options: MediaOptions) -> Inputs:
    """A prompt taken as it is: special tokens and placeholders in its text are what they spell."""
    fields: Mapping[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else prompt
    if not isinstance(fields, Mapping):
        raise BadRequest(f"Expected a prompt as text or an object, but got {type(prompt).__name__}")
    if unknown := [name for name in fields if name not in _FIELDS]:
        raise BadRequest(f"Expected a prompt with {', '.join(_FIELDS)}, but got {str(unknown[0])[:40]!r}")
    text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise BadRequest("Expected a prompt with either prompt or prompt_token_ids")
    token_ids = _token_ids(ids, chat) if text is None else _tokenized(text, chat)
    if not token_ids:
        raise BadRequest("Expected a prompt of at least one token, but it is empty")
    data, uuids = fields.get("multi_modal_data") or {}, fields.get("multi_modal_uuids") or {}
    return Inputs(token_ids, _placed(token_ids, data, uuids, chat, options))


def _tokenized(text: object, chat: ChatFormat) -> tuple[int, ...]:
    if not isinstance(text, str):
        raise BadRequest(f"Expected prompt as text, but got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest("Expected prompt as Unicode text, but it has a lone surrogate") from error
    return tuple(chat.tokenizer.encode(text).ids)


def _token_ids(ids: object, chat: ChatFormat) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise BadRequest(f"Expected prompt_token_ids as a list of numbers, but got {type(ids).__name__}")
    vocabulary = chat.tokenizer.get_vocab_size(with_added_tokens=True)
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise BadRequest(f"Expected prompt_token_ids below {vocabulary}, but got {str(token)[:40]}")
    return tuple(ids)


def _placed(
    token_ids: Sequence[int], data: object, uuids: object, chat: ChatFormat, options: MediaOptions
) -> tuple[MediaPart, ...]:
    """The media in the order of their placeholders."""
    for name, mapping in (("multi_modal_data", data), ("multi_modal_uuids", uuids)):
        if not isinstance(mapping, Mapping) or not mapping.keys() <= {"image", "video"}:
            raise BadRequest(f"Expected {name} with image, video or both, but got something else")
    assert isinstance(data, Mapping)
    assert isinstance(uuids, Mapping)
    kinds: dict[int, Modality] = {chat.image_token: "image", chat.video_token: "video"}
    wanted = [kinds[token] for token in token_ids if token in kinds]
    given = {kind: _named(kind, data.get(kind), uuids.get(kind), options) for kind in kinds.values()}
    for kind, items in given.items():
        if len(items) != wanted.count(kind):
            raise BadRequest(
                f"Expected as many {kind} placeholders in the prompt as items in multi_modal_data, "
                f"but got {wanted.count(kind)} and {len(items)}"
            )
    return tuple(given[kind].pop(0) for kind in wanted)


def _named(kind: Modality, data: object, uuids: object, options: MediaOptions) -> list[MediaPart]:
    """The items of one kind, each with its uuid if it has one; data None stands for an item sent before."""
    names = [uuids] if isinstance(uuids, str) else list(uuids) if isinstance(uuids, list | tuple) else []
    items = [None] * len(names) if data is None else _items(data, kind)
    if names and len(names) != len(items):
        raise BadRequest(f"Expected {len(items)} {kind} names in multi_modal_uuids, but got {len(names)}")
    names = names or [None] * len(items)
    return [_part(item, kind, name, options) for item, name in zip(items, names, strict=True)]


def _items(value: object, kind: Modality) -> list[object]:
    """One item or a list of them. Pictures in a list of videos are the frames of one."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and not _has_metadata(value)
    if not is_list:
        return [value]
    assert isinstance(value, Sequence)
    if kind == "video" and value and all(map(_is_picture, value)):
        return [value]
    return list(value)


def _part(item: object, kind: Modality, name: object, options: MediaOptions) -> MediaPart:
    uuid = checked_uuid(name, "multi_modal_uuids")
    metadata: Mapping[str, Any] = {}
    if _has_metadata(item):
        item, metadata = item
    if item is None and uuid is None:
        raise BadRequest(f"Expected {kind} in multi_modal_data as a path, image or array, but got nothing")
    fps = checked_fps(metadata.get("fps"), f"fps of {kind}")
    if isinstance(item, list | tuple):
        if kind == "image" or not item:
            raise BadRequest(f"Expected {kind} in multi_modal_data as a path, image or array, but got a list")
        return MediaPart(kind, tuple(item), options, fps, uuid)
    is_array = kind == "video" and item is not None and not isinstance(item, str | Path)
    return MediaPart(kind, item, options, fps or (DEFAULT_FPS if is_array else None), uuid)


def _is_picture(item: object) -> bool:
    return hasattr(item, "convert") or getattr(item, "ndim", 0) == 3


def _has_metadata(item: object) -> TypeGuard[tuple[object, Mapping[str, Any]]]:
    """Frames and what is known about them, as vLLM takes them."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)
