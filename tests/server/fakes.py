"""Stand-ins for what lies behind the API, so that its tests need no model and no second process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx
from fastapi import FastAPI

import mmserve
from mmserve.config import ServeConfig
from mmserve.conversation import MediaPart
from mmserve.errors import Forbidden, MediaError, MMServeError, Overloaded
from mmserve.messages import EncodedMedia, EncodedPart, EncodeTimes, Lease, PromptPrefilled, Sampled
from mmserve.models.chat import ChatFormat
from mmserve.request import FinishReason, MediaRef, MediaReport, Prompt
from mmserve.sampling import Logprob
from mmserve.server.app import create_app
from mmserve.server.main import listen, make_server
from mmserve.workers.dispatcher import Update
from mmserve.workers.pipeline import Pipeline
from mmserve.workers.records import Item, Record, State

ANSWER = "red circle moves left then stops"
TOKENS_PER_ITEM = 20
WAIT_S = 10.0


@cache
def chat_format() -> ChatFormat:
    return ChatFormat.from_model_dir(Path(mmserve.__file__).parent / "assets" / "tiny")


class FakePipeline:
    """Answers every prompt with `ANSWER`, one token at a time, on a thread of its own.

    `gate` holds back all but the first token while it is clear. `error`, if set, is how every
    request ends after submission.
    """

    def __init__(self, *, answer: str = ANSWER, max_active: int = 64) -> None:
        self.answer_ids = chat_format().tokenizer.encode(answer, add_special_tokens=False).ids
        self.max_active = max_active
        self.gate = threading.Event()
        self.gate.set()
        self.error: MMServeError | None = None
        self.is_ready = True
        self.without_token = 0
        self.prompts: list[Prompt] = []
        self.cancelled: list[str] = []
        self.records: dict[str, Record] = {}
        self.started = threading.Event()
        self._listeners: dict[str, Callable[[Update], None]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._lock = threading.Lock()

    def as_pipeline(self) -> Pipeline:
        return cast(Pipeline, self)

    @property
    def is_full(self) -> bool:
        return len(self.records) >= self.max_active

    def admit(self, listener: Callable[[Update], None], deadline_s: float | None = None) -> str:
        with self._lock:
            if len(self.records) >= self.max_active:
                raise Overloaded(f"Expected fewer than {self.max_active} requests in the server; try again")
            request_id = secrets.token_hex(16)
            now = time.monotonic()
            self.records[request_id] = Record(
                request_id=request_id, admitted_at=now, deadline_at=now + WAIT_S
            )
            self._listeners[request_id] = listener
        return request_id

    def submit(self, request_id: str, prompt: Prompt, fetch_ms: float = 0.0) -> None:
        record = self.records.get(request_id)
        if record is None:
            return
        self.prompts.append(prompt)
        record.prompt, record.fetch_ms, record.state = prompt, fetch_ms, State.DECODING
        record.items = [_encoded() for _ in prompt.media]
        record.prefilled = _prefilled(record)
        if self.error is not None:
            self.fail(request_id, self.error)
            return
        record.first_token_at = time.monotonic()
        self._thread.submit(self._generate, record, 0)

    def cancel(self, request_id: str) -> None:
        self._finish(request_id, State.CANCELLED, FinishReason.CANCELLED)

    def stop(self, request_id: str) -> None:
        self._finish(request_id, State.FINISHED, FinishReason.STOP)

    def fail(self, request_id: str, error: MMServeError) -> None:
        if record := self.records.get(request_id):
            record.error = error
            self._finish(request_id, State.FAILED, None)

    def counts(self) -> dict[str, int]:
        return {"admitted": 3, "worker_deaths": 1, "active": len(self.records), "waiting": 0}

    def work_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        return {"frames_decoded": 7, "hits/memory": 2}, {"items_open": 1, "bytes/memory": 512}

    def close(self) -> None:
        for request_id in list(self.records):
            self.cancel(request_id)
        self.gate.set()
        self._thread.shutdown(wait=True)

    def wait_idle(self) -> None:
        wait_until(lambda: not self.records)

    def _generate(self, record: Record, index: int) -> None:
        if index > 0:
            self.started.set()
            if not self.gate.wait(0.01):
                self._thread.submit(self._generate, record, index)  # lets other requests run
                return
        if record.request_id not in self.records:
            return
        assert record.prompt is not None
        sampling = record.prompt.sampling
        token_id = self.answer_ids[index]
        is_last = index + 1 in (len(self.answer_ids), sampling.max_tokens)
        finish = FinishReason.STOP if index + 1 == len(self.answer_ids) else FinishReason.LENGTH
        token = Sampled(
            request_id=record.request_id,
            attempt=0,
            seq=index,
            token_id=token_id,
            logprobs=_logprobs(token_id, sampling.logprobs),
        )
        record.tokens.append(token)
        if is_last:
            self._finish(record.request_id, State.FINISHED, finish, (token,))
            return
        listener = self._listeners.get(record.request_id)
        if listener is not None:
            listener(Update(record.request_id, (token,), record, False))
        self._thread.submit(self._generate, record, index + 1)

    def _finish(
        self,
        request_id: str,
        state: State,
        finish: FinishReason | None,
        tokens: tuple[Sampled, ...] = (),
    ) -> None:
        with self._lock:
            record = self.records.pop(request_id, None)
            listener = self._listeners.pop(request_id, None)
        if record is None or listener is None:
            return
        if state is State.CANCELLED:
            self.cancelled.append(request_id)
        record.state, record.finish, record.ended_at = state, finish, time.monotonic()
        listener(Update(request_id, tokens, record, True))


class FakeFetcher:
    """Takes data: URLs at their word. `gate` holds fetching back while it is clear."""

    def __init__(self) -> None:
        self.held = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_waiting = threading.Event()

    async def bring(self, part: MediaPart, salt: str = "") -> MediaRef:
        url = part.content
        self.is_waiting.set()
        await self.gate.wait()
        if url.startswith("http://10."):
            raise Forbidden("The media's host is not on the public internet")
        if not url.startswith("data:"):
            raise MediaError("The media could not be fetched from its host")
        self.held += 1
        digest = hashlib.sha256(url.encode()).hexdigest()
        return MediaRef(
            modality=part.modality,
            path=f"/nowhere/{digest}",
            digest=digest,
            source="data:",
            options=part.options,
        )

    def release(self, ref: MediaRef) -> None:
        self.held -= 1

    def held_bytes(self) -> dict[str, int]:
        return {"media": self.held}


class RunningServer:
    """An app under uvicorn on a thread, as clients meet it."""

    def __init__(self, pipeline: FakePipeline, fetcher: FakeFetcher, config: ServeConfig) -> None:
        self.pipeline, self.fetcher = pipeline, fetcher
        self.app: FastAPI = create_app(
            pipeline=pipeline.as_pipeline(),
            chat=chat_format(),
            fetcher=fetcher,
            config=config,
            model_name="tiny",
        )
        self._listener: socket.socket = listen("127.0.0.1", 0)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False, verify=False)  # noqa: S501  # no TLS
        self._server = make_server(self.app, config.limits)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started)

    def stop(self) -> None:
        self.http.close()
        self.pipeline.close()
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@contextmanager
def running_server(
    config: ServeConfig | None = None, *, pipeline: FakePipeline | None = None
) -> Iterator[RunningServer]:
    server = RunningServer(pipeline or FakePipeline(), FakeFetcher(), config or ServeConfig())
    server.start()
    try:
        yield server
    finally:
        server.stop()


def wait_until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.005)


def ask(
    server: RunningServer,
    *,
    key: str | None = None,
    **body: Any,  # noqa: ANN401  # wrong kinds too
) -> httpx.Response:
    """One request, with a question unless the body brings its own."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return server.http.post("/v1/chat/completions", json={"messages": QUESTION, **body}, headers=headers)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of each server-sent event; the last one must be [DONE]."""
    parts = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


QUESTION: Sequence[dict[str, Any]] = [{"role": "user", "content": "What moves?"}]
VIDEO: Sequence[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
            {"type": "text", "text": "What moves?"},
        ],
    }
]


def _encoded() -> Item:
    part = EncodedPart(
        lease=Lease(lease_id="0" * 32, path="/nowhere", total_bytes=0, arrays=(), checksum=0),
        tokens=TOKENS_PER_ITEM,
        kept=TOKENS_PER_ITEM // 4,
    )
    whole = EncodedMedia(
        cached_tokens=5,
        report=MediaReport(
            source="data:", frames=2, timestamps_s=(0.0, 1.0), lost_frames=0, width=64, height=48
        ),
        times=EncodeTimes(queue=0.1, decode=4.0, preprocess=1.0, encode=8.0, prune=0.5, publish=0.2),
    )
    return Item(parts=[part], whole=whole)


def _prefilled(record: Record) -> PromptPrefilled:
    return PromptPrefilled(
        request_id=record.request_id,
        attempt=0,
        first=None,
        lease=None,
        next_order=0,
        next_position=0,
        slots=0,
        kv_bytes=1000,
        kv_bytes_uncompressed=4000,
        attention_density=(1.0, 0.5),
        queue_ms=0.3,
        transfer_ms=0.2,
        prefill_ms=6.0,
    )


def _logprobs(token_id: int, count: int | None) -> dict[int, Logprob] | None:
    """The chosen token is the second most likely; infinity is a value that occurs."""
    if count is None:
        return None
    others = [other for other in range(30) if other != token_id][: max(count, 1)]
    found = {token_id: Logprob(logprob=-1.5, rank=2)}
    ranks = [1, *range(3, 30)]
    for other, rank in zip(others, ranks, strict=False):
        found[other] = Logprob(logprob=float("-inf") if rank > 2 else -0.5, rank=rank)
    return found
