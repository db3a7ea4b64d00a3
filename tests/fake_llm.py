"""A stand-in for `LLM`: answers by a function, on another thread, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from mmserve.budget import share_of
from mmserve.errors import MMServeError
from mmserve.generation import Deliver
from mmserve.request import (
    Chunk,
    CompletionOutput,
    FinishReason,
    MediaOptions,
    MediaReport,
    Methods,
    RequestOutput,
    Timings,
    Usage,
)
from mmserve.sampling import SamplingParams

Reply = Callable[[str], str | MMServeError]


class FakeGeneration:
    def cancel(self) -> None:
        return None


class FakeLLM:
    """`reply` maps the question's text to an answer or an error; counts depend on the methods."""

    def __init__(self, reply: Reply = str.upper, methods: Methods | None = None) -> None:
        self.reply = reply
        self.methods = methods or Methods()
        self.asked: list[str] = []
        self.messages: list[Sequence[Mapping[str, Any]]] = []
        self.sampling: list[SamplingParams] = []
        self.options: list[MediaOptions | None] = []
        self.closed = False

    def submit(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams,
        *,
        deliver: Deliver,
        methods: Methods | None = None,
        options: MediaOptions | None = None,
        report_tokens: bool = False,
        report_attention: bool = False,
    ) -> FakeGeneration:
        content = messages[-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        self.asked.append(text)
        self.messages.append(messages)
        self.sampling.append(sampling_params)
        self.options.append(options)
        answer = self.reply(text)
        if isinstance(answer, MMServeError):
            deliver(answer)
            return FakeGeneration()
        threading.Thread(target=_deliver, args=(answer, methods or self.methods, deliver)).start()
        return FakeGeneration()

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def completion(text: str, methods: Methods | None = None) -> RequestOutput:
    methods = methods or Methods()
    kept = int(100 * share_of(methods.keep, 4, 25))
    return RequestOutput(
        request_id="r1",
        outputs=(CompletionOutput(text=text, token_ids=(5, 6, 7), finish_reason=FinishReason.STOP),),
        prompt_token_ids=(1, 2, 3),
        usage=Usage(
            prompt_tokens=110,
            completion_tokens=3,
            visual_tokens=100,
            visual_tokens_kept=kept,
            kv_bytes=64 * (10 + kept),
            kv_bytes_uncompressed=64 * 110,
        ),
        timings_ms=Timings(
            decode=1.0, encode=2.0, prefill=3.0, ttft=6.0 + kept / 100, generate=4.0, total=11.0
        ),
        media=(
            MediaReport(
                source="clip.mp4", frames=8, timestamps_s=(0.0, 0.25), lost_frames=0, width=144, height=144
            ),
        ),
        methods=methods,
    )


def _deliver(text: str, methods: Methods, deliver: Deliver) -> None:
    middle = len(text) // 2
    deliver(Chunk(text=text[:middle], token_ids=(5,)))
    deliver(Chunk(text=text[middle:], token_ids=(6, 7)))
    deliver(completion(text, methods))
