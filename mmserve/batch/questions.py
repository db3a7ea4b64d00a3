"""Reads a file of questions: the project's own rows and OpenAI batch lines, in any mixture.

A row that cannot be asked is kept with its `problem`, so that it becomes an error row instead of
stopping the others. Knows nothing about answering.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmserve.batch.score import LETTERS, choice_prompt, chosen, without_labels
from mmserve.conversation import parse
from mmserve.errors import BadRequest, MMServeError, NotFound
from mmserve.media.options import media_options
from mmserve.request import Modality
from mmserve.sampling import SamplingParams

STILL_SUFFIXES = frozenset((".jpg", ".jpeg", ".png"))
IMAGE_SUFFIXES = STILL_SUFFIXES | {".webp", ".gif"}
OPENAI_URL = "/v1/chat/completions"
MAX_LINE_BYTES = 64 << 20  # a line may carry media as a data URL
ROW_KEYS = frozenset(
    ("id", "video", "image", "media", "question", "options", "answer", "start", "end", "meta")
)
# body fields that change nothing here; all others must be known
_IGNORED = frozenset(
    ("messages", "model", "user", "metadata", "store", "service_tier", "safety_identifier", "media_io_kwargs")
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row. `media` are absolute paths or URLs; `span` is the part of the video in seconds, `media_io` how
    an OpenAI line wants its media sampled.

    `body` is an OpenAI line's, with its media paths made absolute, and None for own rows.
    """

    question_id: str
    line: int
    text: str = ""
    messages: tuple[Json, ...] = ()
    media: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    options: tuple[str, ...] = ()
    answer: str | None = None
    span: tuple[float, float | None] | None = None
    media_io: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    body: Json | None = None
    problem: MMServeError | None = None


def read_questions(path: Path, sampling: SamplingParams | None = None) -> list[Question]:
    """Every row of the file in order; raises BadRequest when two rows share an id."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise NotFound(f"Expected a readable file of questions, but got {path.name}") from error
    root = path.parent.resolve()
    asked = [
        _question(line, number, root, sampling or SamplingParams())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    seen: dict[str, int] = {}
    for question in asked:
        first = seen.setdefault(question.question_id, question.line)
        if first != question.line:
            name = question.question_id
            raise BadRequest(f"Expected every id once, but {name!r} is in lines {first} and {question.line}")
    return asked


def modality_of(source: str) -> Modality:
    """What a path or URL holds, by its ending; what is not known as an image counts as video."""
    if source.startswith("data:"):
        return "image" if source.startswith("data:image/") else "video"
    name = urlsplit(source).path if is_url(source) else source
    return "image" if Path(name).suffix.lower() in IMAGE_SUFFIXES else "video"


def is_url(source: str) -> bool:
    return source.startswith("data:") or "://" in source


def media_part(source: str, modality: Modality | None = None) -> Json:
    """A content part for a path or URL."""
    modality = modality or modality_of(source)
    if is_url(source):
        return {"type": f"{modality}_url", f"{modality}_url": {"url": source}}
    return {"type": modality, modality: source}


def media_type(path: str) -> str:
    return mimetypes.guess_type(path)[0] or f"{modality_of(path)}/mp4"


def _question(line: bytes, number: int, root: Path, sampling: SamplingParams) -> Question:
    question_id, openai = f"line-{number}", False
    try:
        row = _object(line)
        openai = "custom_id" in row
        question_id = _id(row.get("custom_id" if openai else "id"))
        read = _read_openai if openai else _read_own
        return read(row, question_id, number, root, sampling)
    except MMServeError as problem:
        body: Json | None = {} if openai else None
        return Question(question_id=question_id, line=number, problem=problem, body=body)


def _object(line: bytes) -> Json:
    if len(line) > MAX_LINE_BYTES:
        raise BadRequest(f"Expected a line of at most {MAX_LINE_BYTES} bytes, but got {len(line)}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest("Expected a line of JSON, but it does not parse") from error
    if not isinstance(row, dict):
        raise BadRequest(f"Expected a JSON object, but got {type(row).__name__}")
    return row


def _id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"Expected an id as text, but got {_kind(value)}")
    return value


def _read_own(row: Json, question_id: str, number: int, root: Path, sampling: SamplingParams) -> Question:
    if unknown := sorted(row.keys() - ROW_KEYS):
        raise BadRequest(f"Expected no other data than under 'meta', but got {unknown[0]!r}")
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise BadRequest(f"Expected a question as text, but got {_kind(text)}")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise BadRequest(f"Expected meta as an object, but got {_kind(meta)}")
    options = _options(row.get("options"))
    content = [_located(part, root) for part in _own_media(row)]
    content.append({"type": "text", "text": choice_prompt(text, options) if options else text})
    return Question(
        question_id=question_id,
        line=number,
        text=text,
        messages=({"role": "user", "content": content},),
        media=_checked_media([{"role": "user", "content": content}]),
        sampling=sampling,
        options=options,
        answer=_answer(row.get("answer"), options),
        span=_span(row),
        meta=meta,
    )


def _own_media(row: Json) -> list[Json]:
    given = [key for key in ("video", "image", "media") if key in row]
    if len(given) != 1:
        raise BadRequest(f"Expected one of video, image and media, but got {', '.join(given) or 'none'}")
    key = given[0]
    items = row[key] if isinstance(row[key], list) else [row[key]]
    if key == "video" and items and all(isinstance(item, str) and _is_still(item) for item in items):
        items = [items]
    parts: list[Json] = []
    for item in items:
        if isinstance(item, str) and item:
            modality: Modality | None = "video" if key == "video" else "image" if key == "image" else None
            parts.append(media_part(item, modality))
        elif key == "video" and isinstance(item, list):
            parts.append({"type": "video", "video": item})
        elif key == "media" and isinstance(item, dict):
            parts.append(item)
        else:
            raise BadRequest(f"Expected {key} as a path or URL, but got {_kind(item)}")
    if not any(part.get("type") != "text" for part in parts):
        raise BadRequest(f"Expected {key} with at least one item, but got none")
    return parts


def _options(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    is_texts = isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
    if not isinstance(value, list) or not is_texts or not 2 <= len(value) <= len(LETTERS):
        raise BadRequest(f"Expected options as a list of 2 to {len(LETTERS)} texts, but got {_kind(value)}")
    return without_labels(value)


def _answer(value: object, options: Sequence[str]) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRequest(f"Expected an answer as text, but got {_kind(value)}")
    answer = str(value)
    if options and chosen(answer, options) is None:
        raise BadRequest(f"Expected the answer to be one of the options, but got {answer!r}")
    return answer


def _span(row: Json) -> tuple[float, float | None] | None:
    start, end = row.get("start"), row.get("end")
    for name, value in (("start", start), ("end", end)):
        is_time = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if value is not None and not is_time:
            raise BadRequest(f"Expected {name} as seconds of 0 or more, but got {value!r}")
    if start is None and end is None:
        return None
    if end is not None and end <= (start or 0):
        raise BadRequest(f"Expected end after start, but got {start or 0:g} to {end:g}")
    return float(start or 0), None if end is None else float(end)


def _read_openai(row: Json, question_id: str, number: int, root: Path, sampling: SamplingParams) -> Question:
    if row.get("method", "POST") != "POST" or row.get("url", OPENAI_URL) != OPENAI_URL:
        raise BadRequest(f"Expected POST {OPENAI_URL}, but got {row.get('method')} {row.get('url')}")
    body = row.get("body")
    if not isinstance(body, dict):
        raise BadRequest(f"Expected body as an object, but got {_kind(body)}")
    messages = body.get("messages")
    if isinstance(messages, list):
        messages = [_located_message(message, root) for message in messages]
    media = _checked_media(messages)
    media_io = body.get("media_io_kwargs") or {}
    media_options(media_io)
    return Question(
        question_id=question_id,
        line=number,
        text=_last_text(messages),
        messages=tuple(messages or ()),
        media=media,
        sampling=_sampling(body, sampling),
        media_io=media_io,
        body={**body, "messages": messages},
    )


def _sampling(body: Json, default: SamplingParams) -> SamplingParams:
    known: dict[str, Any] = {"max_tokens": default.max_tokens, "temperature": default.temperature}
    for key, value in body.items():
        if key in _IGNORED or value is None or (key, value) in (("n", 1), ("stream", False)):
            continue
        if key == "max_completion_tokens":
            known["max_tokens"] = _number(key, value, whole=True)
        elif key in ("max_tokens", "top_k", "seed"):
            known[key] = _number(key, value, whole=True)
        elif key in ("temperature", "top_p"):
            known[key] = _number(key, value, whole=False)
        elif key == "stop":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise BadRequest(f"Expected stop as texts, but got {_kind(value)}")
            known[key] = tuple(texts)
        else:
            raise BadRequest(f"Expected no {key} in a batch line, but got {value!r}"[:200])
    return SamplingParams(**known)


def _number(name: str, value: object, *, whole: bool) -> Any:  # noqa: ANN401  # int or float, as asked
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise BadRequest(f"Expected {name} as a {'whole ' if whole else ''}number, but got {_kind(value)}")
    return value


def _located_message(message: object, root: Path) -> object:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_located(part, root) for part in message["content"]]}


def _located(part: Any, root: Path) -> Any:  # noqa: ANN401  # whatever it is, `parse` checks it
    """A content part whose path, if it has one, is absolute."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("image", "video", "image_url", "video_url"):
        return part
    value = part.get(kind)
    source = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(source, list):
        return {**part, kind: [_absolute(frame, root) for frame in source]}
    if not isinstance(source, str) or not source or is_url(source):
        return part
    modality: Modality = "image" if kind.startswith("image") else "video"
    named: Json = {name: part[name] for name in ("uuid", "fps") if name in part}
    return {**media_part(str(root / source), modality), **named}


def _absolute(source: object, root: Path) -> object:
    is_path = isinstance(source, str) and source and not is_url(source)
    return str(root / str(source)) if is_path else source


def _is_still(source: str) -> bool:
    """Whether it can be nothing but a picture: GIF and WebP may move."""
    return Path(urlsplit(source).path if is_url(source) else source).suffix.lower() in STILL_SUFFIXES


def _checked_media(messages: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Sources of all media; raises when the conversation is malformed or a file is not there."""
    contents = [part.content for part in parse(messages, on_this_host=True).media]
    each = [content if isinstance(content, tuple) else (content,) for content in contents]
    sources = tuple(str(source) for some in each for source in some if source is not None)
    for source in sources:
        if not is_url(source) and not Path(source).is_file():
            raise NotFound(f"Expected a media file, but there is none at {source}")
    return sources


def _last_text(messages: Any) -> str:  # noqa: ANN401
    content = messages[-1]["content"]
    texts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    return str(texts[-1]) if texts else ""


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
