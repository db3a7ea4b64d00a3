"""Who answers a question: a pipeline on this machine, or a server over HTTP.

Knows nothing about files of rows.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import msgspec

from mmserve.batch.questions import Question, is_url, media_type
from mmserve.errors import MMServeError, Unavailable, from_code
from mmserve.media.options import media_io_kwargs, media_options
from mmserve.methods import takes_no_keep
from mmserve.request import Chunk, MediaOptions, Methods, RequestOutput
from mmserve.sampling import SamplingParams

if TYPE_CHECKING:
    from mmserve.generation import Deliver

Json = dict[str, Any]
RETRIES = 4  # of an answer that says to come back later
MAX_WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one question: text and reports, or an error. `methods` is None when not reported."""

    text: str = ""
    finish_reason: str = ""
    usage: Json = field(default_factory=dict)
    timings_ms: Json = field(default_factory=dict)
    methods: Json | None = None
    error: MMServeError | None = None


class Answerer(Protocol):
    """Starts questions; each ends in exactly one call of `done`, on any thread."""

    def start(self, question: Question, done: Callable[[Answer], None]) -> None: ...


class Submits(Protocol):
    """The part of `LLM` that is used here."""

    def submit(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams,
        *,
        deliver: Deliver,
        methods: Methods | None = None,
        options: MediaOptions | None = None,
        report_attention: bool = False,
    ) -> object: ...


class LocalAnswerer:
    """Answers with an `LLM`; with `report_attention` it measures what sparse attention loses, slowly."""

    def __init__(
        self, llm: Submits, methods: Methods, options: MediaOptions, *, report_attention: bool = False
    ) -> None:
        self._llm = llm
        self._methods = methods
        self._options = options
        self._report_attention = report_attention

    def start(self, question: Question, done: Callable[[Answer], None]) -> None:
        def deliver(news: Chunk | RequestOutput | MMServeError) -> None:
            if isinstance(news, RequestOutput):
                done(_completed(news))
            elif isinstance(news, MMServeError):
                done(Answer(error=news))

        try:
            options = sampled(question, self._options)
            self._llm.submit(
                question.messages,
                question.sampling,
                methods=self._methods,
                options=options,
                deliver=deliver,
                report_attention=self._report_attention,
            )
        except MMServeError as error:
            done(Answer(error=error))


def sampled(question: Question, default: MediaOptions) -> MediaOptions:
    """How the media of a question are sampled: what its row says comes before what holds for all."""
    options = media_options(question.media_io, default)
    if question.span is not None:
        start_s, end_s = question.span
        options = msgspec.structs.replace(options, start_s=start_s, end_s=end_s)
    return options


def _completed(output: RequestOutput) -> Answer:
    (answer,) = output.outputs
    return Answer(
        text=answer.text,
        finish_reason=str(answer.finish_reason),
        usage=msgspec.to_builtins(output.usage),
        timings_ms=msgspec.to_builtins(output.timings_ms),
        methods=msgspec.to_builtins(output.methods),
    )


class ServerAnswerer:
    """Answers through `/v1/chat/completions` of a running server; files travel as data URLs."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        options: MediaOptions | None = None,
        extensions: Json | None = None,
        concurrency: int = 16,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"),
                headers=headers,
                timeout=timeout_s,
                transport=transport,
            )
            self._model = model or self._served_model()
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise Unavailable(f"Expected a server at {url}, but there is none that answers") from error
        self._options = options or MediaOptions()
        self._extensions = extensions or {}
        self._sleep = sleep
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="mmserve-batch")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    def start(self, question: Question, done: Callable[[Answer], None]) -> None:
        self._pool.submit(self._answer, question, done)

    def _served_model(self) -> str:
        response = self._client.get("/v1/models")
        if response.status_code != 200:
            raise _refused(response)
        return str(response.json()["data"][0]["id"])

    def _answer(self, question: Question, done: Callable[[Answer], None]) -> None:
        try:
            answer = self._ask(question)
        except MMServeError as error:
            answer = Answer(error=error)
        except httpx.HTTPError as error:
            answer = Answer(error=Unavailable(f"The server did not answer: {type(error).__name__}"))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            answer = Answer(error=MMServeError(f"The exchange failed: {type(error).__name__}"))
        done(answer)

    def _ask(self, question: Question) -> Answer:
        body = self._body(question)
        for attempt in range(RETRIES + 1):
            response = self._client.post("/v1/chat/completions", json=body)
            if response.status_code not in (429, 503) or attempt == RETRIES:
                break
            self._sleep(_wait_s(response, attempt))
        if response.status_code != 200:
            raise _refused(response)
        reply = response.json()
        choice, usage = reply["choices"][0], dict(reply.get("usage") or {})
        report = usage.pop("mmserve", None) or {}
        return Answer(
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"] or "",
            usage=report.get("usage", usage),
            timings_ms=report.get("timings_ms", {}),
            methods=report.get("methods"),
        )

    def _body(self, question: Question) -> Json:
        body = dict(question.body or {})
        if sampling_of_media := media_io_kwargs(sampled(question, self._options)):
            body["media_io_kwargs"] = sampling_of_media
        sampling = question.sampling
        if question.body is None:
            body |= {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        messages = [_portable_message(message) for message in question.messages]
        return {**body, "model": self._model, "messages": messages, "stream": False, **self._extensions}


def extensions(methods: Methods) -> Json:
    """The field `mmserve`: methods other than the defaults, and that counts and times are wanted."""
    given, defaults = msgspec.to_builtins(methods), msgspec.to_builtins(Methods())
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    if not takes_no_keep(methods.prune):
        changed["keep"] = methods.keep
    return {"mmserve": {"report": True, **changed}}


def _portable_message(message: Json) -> Json:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_portable(part) for part in message["content"]]}


def _portable(part: Json) -> Json:
    """A content part as any machine can take it."""
    kind = part["type"]
    if kind not in ("image", "video"):
        return part
    source = part[kind]
    if isinstance(source, list):
        return {**part, kind: [_portable_url(frame) for frame in source]}
    named: Json = {name: part[name] for name in ("uuid", "fps") if name in part}
    url = None if source is None else _portable_url(source)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}, **named}


def _portable_url(source: str) -> str:
    if is_url(source):
        return source
    data = base64.b64encode(Path(source).read_bytes()).decode("ascii")
    return f"data:{media_type(source)};base64,{data}"


def _wait_s(response: httpx.Response, attempt: int) -> float:
    try:
        asked = float(response.headers.get("retry-after", ""))
    except ValueError:
        asked = 2.0**attempt
    return min(max(asked, 0.1), MAX_WAIT_S)


def _refused(response: httpx.Response) -> MMServeError:
    """The server's error; its code and message are its own, shortened."""
    try:
        error = response.json()["error"]
        code, message = str(error.get("code")), str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message = "", ""
    return from_code(code, message[:500] or f"The server answered with status {response.status_code}")
