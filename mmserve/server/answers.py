"""From a checked request to a running one, and to its one end: admission, fetching, starting, letting go.

Knows nothing about HTTP but that a client may leave.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from mmserve.budget import keep_under_load
from mmserve.conversation import Conversation, MediaPart
from mmserve.errors import MMServeError, Overloaded, Unavailable
from mmserve.generation import Generation
from mmserve.metrics import Metrics
from mmserve.models.chat import ChatFormat
from mmserve.request import (
    Chunk,
    FinishReason,
    MediaRef,
    Methods,
    Prompt,
    RequestOutput,
)
from mmserve.sampling import SamplingParams
from mmserve.server.feed import Feed, SlowReader
from mmserve.workers.pipeline import Pipeline

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Fetches(Protocol):
    """What brings media onto this host; `release` lets go of what `bring` returned."""

    async def bring(self, part: MediaPart, salt: str = "") -> MediaRef: ...

    def release(self, ref: MediaRef) -> None: ...

    def held_bytes(self) -> dict[str, int]: ...


class Load(NamedTuple):
    """How far `methods.keep` may fall, and with how many requests before this one it does."""

    floor: float
    full: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request for answers to one conversation, checked."""

    conversation: Conversation
    sampling: SamplingParams
    methods: Methods
    salt: str = ""
    priority: int = 0  # lower comes earlier
    report_tokens: bool = False
    load: Load | None = None


class Door:
    """Lets requests in, knows those that are inside, and closes for good with `drain`."""

    def __init__(self, pipeline: Pipeline, chat: ChatFormat, fetcher: Fetches, metrics: Metrics) -> None:
        self.pipeline = pipeline
        self.chat = chat
        self.fetcher = fetcher
        self.metrics = metrics
        self.is_draining = False
        self._inside: set[Answer] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def check_room(self) -> None:
        """Raise where a request could not come in just now: asked before its body is read."""
        if self.is_draining:
            raise Unavailable("The server is shutting down")
        if self.pipeline.is_full:
            raise Overloaded("Expected fewer requests in the server; try again")

    async def open(self, call: Call) -> Answer:
        """Admit, fetch, start. Raises what is wrong; then nothing is left behind."""
        try:
            self.check_room()
            answer = await self._admit(call.sampling)
        except MMServeError as error:
            self.metrics.count_request(error.code)
            raise
        try:
            started_at = time.perf_counter()
            media = await self._fetch(call.conversation.media, answer, call.salt)
            fetch_ms = (time.perf_counter() - started_at) * 1e3
            # tokenizing a long text takes a while
            token_ids = await asyncio.to_thread(self.chat.encode, call.conversation.messages)
            prompt = Prompt(
                token_ids=tuple(token_ids),
                media=media,
                sampling=call.sampling,
                methods=self._eased(call),
                salt=call.salt,
                priority=call.priority,
                report_tokens=call.report_tokens,
            )
            answer.generation.start(prompt, fetch_ms)
        except MMServeError as error:
            answer.fail(error)
            raise
        except BaseException:
            answer.close()
            raise
        return answer

    def drain(self) -> None:
        """From now on nobody comes in; who is inside may finish."""
        self.is_draining = True

    async def wait_empty(self) -> None:
        await self._empty.wait()

    def cancel_all(self) -> None:
        """End every request; its reader gets Unavailable."""
        for answer in tuple(self._inside):
            answer.generation.cancel()

    async def _admit(self, sampling: SamplingParams) -> Answer:
        """Places in the pipeline. Its thread is asked, so not on the event loop."""
        answer = Answer(self, asyncio.get_running_loop())
        admission = asyncio.ensure_future(
            asyncio.to_thread(Generation, self.pipeline, self.chat, sampling, answer.feed.put)
        )
        try:
            answer.generation = await asyncio.shield(admission)
        except asyncio.CancelledError:
            admission.add_done_callback(_cancel_admitted)
            raise
        self._inside.add(answer)
        self._empty.clear()
        return answer

    def _eased(self, call: Call) -> Methods:
        """Fewer tokens while others wait."""
        keep = call.methods.keep
        if call.load is None or not isinstance(keep, float):
            return call.methods
        keep = keep_under_load(keep, call.load.floor, self.pipeline.without_token, call.load.full)
        self.metrics.note_keep(keep)
        return msgspec.structs.replace(call.methods, keep=keep)

    async def _fetch(self, parts: Sequence[MediaPart], answer: Answer, salt: str) -> tuple[MediaRef, ...]:
        found: dict[int, MediaRef] = {}

        async def one(place: int, part: MediaPart) -> None:
            found[place] = await self.fetcher.bring(part, salt)
            answer.held.append(found[place])

        # what is sent comes before what refers to it
        for is_sent in (True, False):
            chosen = [one(*item) for item in enumerate(parts) if (item[1].content is not None) is is_sent]
            for result in await asyncio.gather(*chosen, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
        return tuple(found[place] for place in range(len(parts)))

    def _left(self, answer: Answer) -> None:
        self._inside.discard(answer)
        if not self._inside:
            self._empty.set()


class Answer:
    """One running request. Whoever opened it calls `close`, however it went."""

    generation: Generation

    def __init__(self, door: Door, loop: asyncio.AbstractEventLoop) -> None:
        self._door = door
        self.feed = Feed(loop, self._give_up)
        self.held: list[MediaRef] = []
        self._outcome: str | None = None

    async def next(self) -> Chunk | RequestOutput:
        """The next chunk or, last, the output; raises the error the request ended with."""
        news = await self.feed.get()
        if isinstance(news, RequestOutput):
            reasons = [output.finish_reason for output in news.outputs]
            if FinishReason.CANCELLED in reasons:
                self._end("cancelled")
                raise Unavailable("The server is shutting down and could not finish this request")
            self._door.metrics.count_finished(
                msgspec.structs.asdict(news.usage), msgspec.structs.asdict(news.timings_ms)
            )
            usage = news.usage
            self._door.metrics.note_density(
                usage.attention_density, usage.prompt_tokens - usage.cached_tokens
            )
            self._end(reasons[0])
        elif isinstance(news, MMServeError):
            self._end(news.code)
            raise news
        return news

    async def output(self) -> RequestOutput:
        while not isinstance(news := await self.next(), RequestOutput):
            pass
        return news

    def fail(self, error: MMServeError) -> None:
        """It cannot start."""
        self.generation.fail(error)
        self._end(error.code)

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        if self._outcome is None:
            self.generation.cancel()
            self._end("cancelled")

    def _give_up(self) -> None:
        self._door.metrics.count_slow_reader()
        self.generation.cancel()
        self._end(SlowReader.code)

    def _end(self, outcome: str) -> None:
        if self._outcome is not None:
            return
        self._outcome = outcome
        self._door.metrics.count_request(outcome)
        if outcome != SlowReader.code:
            self.feed.close()
        for ref in self.held:
            self._door.fetcher.release(ref)
        self.held.clear()
        self._door._left(self)
        logger.info("request ended", extra={"request_id": self.generation.request_id, "outcome": outcome})


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


async def unless(gone: Awaitable[object], work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled with ClientGone when `gone` comes first."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


def _cancel_admitted(admission: asyncio.Future[Generation]) -> None:
    """The client left while its request was being admitted."""
    if not admission.cancelled() and admission.exception() is None:
        admission.result().cancel()
