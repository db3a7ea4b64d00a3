"""A model's own chat format: template and tokenizer, from messages to token ids and back to text.

Needs no torch and no transformers, so the API process can use it. Knows nothing about media files:
each media part becomes one placeholder token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mmserve.errors import BadRequest, ConfigError

Message = Mapping[str, Any]  # an OpenAI chat message whose media parts are {"type": "image" | "video"}
# stands for one piece of user text while the template is rendered; private-use characters cannot clash
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Tokenizer, template and special ids of one model directory."""

    tokenizer: Tokenizer
    template: Template
    specials: tuple[str, ...]
    image_token: int
    video_token: int
    eos_tokens: tuple[int, ...]

    @classmethod
    def from_model_dir(cls, path: Path) -> ChatFormat:
        tokenizer_file = path / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise ConfigError(f"Expected tokenizer.json in {path.name}, but found none")
        config = json.loads((path / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        image, video = _media_token(config, "image"), _media_token(config, "video")
        specials = tuple(
            token.content
            for number, token in tokenizer.get_added_tokens_decoder().items()
            if token.special or number in (image, video)
        )
        text = config.get("text_config", config)
        eos = text.get("eos_token_id", config.get("eos_token_id"))
        return cls(
            tokenizer=tokenizer,
            template=_environment().from_string(_template_text(path)),
            specials=specials,
            image_token=image,
            video_token=video,
            eos_tokens=tuple(eos) if isinstance(eos, list) else (eos,),
        )

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn, one id per media item.

        Text that spells a special token is encoded with special tokens disabled, so a user can
        type `<image>` without claiming an image (the rest is unchanged). Raises BadRequest unless the
        placeholders are those of the media parts, in their order.
        """
        texts: list[str] = []
        marked = [self._marked(message, texts) for message in messages]
        try:
            rendered = self.template.render(messages=marked, add_generation_prompt=True)
        except TemplateError as error:
            raise BadRequest("Expected messages that fit the model's chat template") from error
        # one pass: marks inside user text are text
        whole = _MARKED.sub(lambda mark: texts[int(mark[1])], rendered)
        # compared as a whole, because pieces that are harmless alone may spell a special token together
        if self._count_specials(whole) != self._count_specials(rendered):
            ids = self._encode_pieces(rendered, texts)
        else:
            ids = list(self.tokenizer.encode(whole, add_special_tokens=False).ids)
        self._check_media(ids, messages)
        return ids

    def _count_specials(self, text: str) -> int:
        return sum(text.count(special) for special in self.specials)

    def _check_media(self, ids: Sequence[int], messages: Sequence[Message]) -> None:
        """The pipeline pairs placeholders with media by order alone, so it has to be the same."""
        kinds = {self.image_token: "image", self.video_token: "video"}
        found = [kinds[token] for token in ids if token in kinds]
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        if found != (given := [part["type"] for part in parts if part["type"] != "text"]):
            shown = ", ".join(found[:8]) or "none"
            raise BadRequest(
                f"Expected media whose order the model's chat template keeps, but {len(given)} became {shown}"
            )

    def _marked(self, message: Message, texts: list[str]) -> dict[str, object]:
        def mark(text: str) -> str:
            texts.append(text)
            return _MARK.format(len(texts) - 1)

        content = message["content"]
        if isinstance(content, str):
            return {"role": message["role"], "content": [{"type": "text", "text": mark(content)}]}
        parts = [
            {"type": "text", "text": mark(part["text"])} if part["type"] == "text" else part
            for part in content
        ]
        return {"role": message["role"], "content": parts}

    def _encode_pieces(self, rendered: str, texts: list[str]) -> list[int]:
        ids: list[int] = []
        # odd places hold the numbers of user texts, even ones the template's own words
        for place, piece in enumerate(_MARKED.split(rendered)):
            parts = self._harmless(texts[int(piece)]) if place % 2 else [piece]
            for part in parts:
                ids += self.tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def _harmless(self, text: str) -> list[str]:
        """Cut text so that no piece contains a special token: each one behind its first character."""
        specials = re.compile("|".join(map(re.escape, self.specials)))
        pieces, start = [], 0
        while found := specials.search(text, start):
            cut = found.start() + 1
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """One token as text, special tokens spelled out: for log-probability reports."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are rendered as they are."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # declared as a set, only read

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _media_token(config: Mapping[str, Any], modality: str) -> int:
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        if isinstance(token := config.get(name), int):
            return token
    raise ConfigError(f"Expected {modality}_token_id in config.json, but found none")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment


def _template_text(path: Path) -> str:
    """The model's chat template: its own file, or a field of a JSON file beside it."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (path / name).is_file() and (text := json.loads((path / name).read_text()).get("chat_template")):
            return str(text)
    raise ConfigError(f"Expected a chat template in {path.name}, but found none")


class Detokenizer:
    """Turns a growing list of token ids into text that never changes once given out.

    Text is held back while it ends in an unfinished character or could be the start of a stop
    string; a stop string itself is given out only with `keeps_stop`. One that ends within the first
    `min_tokens` is text like any other.
    """

    def __init__(
        self, chat: ChatFormat, stop: Sequence[str] = (), *, keeps_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._chat = chat
        self._keeps_stop = keeps_stop
        self._min_tokens = min_tokens
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._settled = 0  # ids whose text is final
        self._context = 0  # decode from here: word boundaries depend on the ids before
        self._held = ""
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Text that became certain with these ids."""
        if self.stopped:
            return ""
        self._ids += ids
        before = self._chat.decode(self._ids[self._context : self._settled])
        after = self._chat.decode(self._ids[self._context :])
        if after.endswith("\ufffd"):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return self._release(after[len(before) :])

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        if self.stopped:
            return ""
        tail = self._chat.decode(self._ids[self._context :])
        known = self._chat.decode(self._ids[self._context : self._settled])
        text, self._held = self._release(tail[len(known) :]) + self._held, ""
        self._settled = len(self._ids)
        return text

    def _release(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [(at, len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found and len(self._ids) > self._min_tokens:
            self.stopped = True
            at, length = min(found)
            return text[: at + length if self._keeps_stop else at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
