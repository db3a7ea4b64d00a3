"""What a caller in Python asks, as token ids and media: OpenAI conversations and vLLM's prompts.

Knows nothing about fetching, and nothing about requests once they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

from mmserve.conversation import MediaPart, parse
from mmserve.errors import BadRequest
from mmserve.models.chat import ChatFormat
from mmserve.request import MediaOptions, Modality

Messages: TypeAlias = Sequence[Mapping[str, Any]]
# text, {"prompt": text} or {"prompt_token_ids": ids}; the last two with "multi_modal_data" or without
PromptInput: TypeAlias = str | Mapping[str, Any]

# of frames that come as a bare array, which only reports and models with a sense of time notice
ARRAY_FPS = 2.0
_FIELDS = ("prompt", "prompt_token_ids", "multi_modal_data")


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
    return Inputs(token_ids, _placed(token_ids, fields.get("multi_modal_data") or {}, chat, options))


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
    token_ids: Sequence[int], data: object, chat: ChatFormat, options: MediaOptions
) -> tuple[MediaPart, ...]:
    """The media in the order of their placeholders."""
    if not isinstance(data, Mapping) or not data.keys() <= {"image", "video"}:
        raise BadRequest("Expected multi_modal_data with image, video or both, but got something else")
    kinds: dict[int, Modality] = {chat.image_token: "image", chat.video_token: "video"}
    wanted = [kinds[token] for token in token_ids if token in kinds]
    given = {kind: list(_items(data.get(kind))) for kind in kinds.values()}
    for kind, items in given.items():
        if len(items) != wanted.count(kind):
            raise BadRequest(
                f"Expected as many {kind} placeholders in the prompt as items in multi_modal_data, "
                f"but got {wanted.count(kind)} and {len(items)}"
            )
    return tuple(_part(given[kind].pop(0), kind, options) for kind in wanted)


def _items(value: object) -> Iterator[object]:
    """One item or a list of them."""
    if value is None:
        return
    if isinstance(value, Sequence) and not isinstance(value, str) and not _has_metadata(value):
        yield from value
    else:
        yield value


def _part(item: object, kind: Modality, options: MediaOptions) -> MediaPart:
    metadata: Mapping[str, Any] = {}
    if _has_metadata(item):
        item, metadata = item
    if item is None:
        raise BadRequest(f"Expected {kind} in multi_modal_data as a path, image or array, but got nothing")
    is_array = kind == "video" and not isinstance(item, str | Path)
    return MediaPart(kind, item, options, metadata.get("fps", ARRAY_FPS) if is_array else None)


def _has_metadata(item: object) -> TypeGuard[tuple[object, Mapping[str, Any]]]:
    """Frames and what is known about them, as vLLM takes them."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)
