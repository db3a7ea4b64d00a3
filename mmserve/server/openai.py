"""OpenAI's response shapes: completions, chunks, log-probabilities, usage and our report in it.

Pure functions from results to plain data; knows nothing about routes or connections.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mmserve.request import Chunk, CompletionOutput, FinishReason, RequestOutput
from mmserve.sampling import Logprob

DONE = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every message of one response repeats, and what its client asked to see."""

    request_id: str
    model: str
    wants_usage: bool = False  # in a stream
    wants_report: bool = False
    top_logprobs: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, done: RequestOutput) -> dict[str, Any]:
        choices = [self._choice(output) for output in done.outputs]
        return self._body("chat.completion", choices, {"usage": self.usage(done)})

    def role(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, chunk: Chunk) -> dict[str, Any]:
        logprobs = self._logprobs(chunk.token_ids, chunk.logprobs)
        return self._chunk(chunk.index, {"content": chunk.text}, logprobs)

    def finish(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return self._chunk(index, {}, None, str(reason))

    def usage_chunk(self, done: RequestOutput) -> dict[str, Any]:
        return self._body("chat.completion.chunk", [], {"usage": self.usage(done)})

    def usage(self, done: RequestOutput) -> dict[str, Any]:
        counts = done.usage
        body: dict[str, Any] = {
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
            "total_tokens": counts.prompt_tokens + counts.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        }
        if self.wants_report:
            body["mmserve"] = report(done)
        return body

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.token_ids, output.logprobs),
            "finish_reason": str(output.finish_reason),
        }

    def _chunk(
        self, index: int, delta: object, logprobs: object = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice], {"usage": None} if self.wants_usage else {})

    def _body(self, kind: str, choices: list[Any], more: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]] | None
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = []
        for token_id, candidates in zip(token_ids, logprobs, strict=False):
            best = sorted(candidates.values(), key=lambda entry: entry.rank)[: self.top_logprobs]
            content.append(
                _spelled(candidates[token_id]) | {"top_logprobs": [_spelled(each) for each in best]}
            )
        return {"content": content, "refusal": None}


def report(done: RequestOutput) -> dict[str, Any]:
    """The keys of `ask --json` without the answer."""
    methods = msgspec.to_builtins(done.methods)
    if methods["attention_profile"] is not None:
        # where a server's files lie is not its clients' business
        methods["attention_profile"] = Path(methods["attention_profile"]).name
    return {
        "finish_reason": str(done.outputs[0].finish_reason),
        "usage": msgspec.to_builtins(done.usage),
        "attention_density": list(done.usage.attention_density),
        "media": msgspec.to_builtins(done.media),
        "timings_ms": msgspec.to_builtins(done.timings_ms),
        "methods": methods,
    }


def _spelled(entry: Logprob) -> dict[str, Any]:
    return {
        "token": entry.decoded_token,
        "logprob": max(entry.logprob, _LOWEST_LOGPROB),
        "bytes": list(entry.decoded_token.encode("utf-8", "replace")),
    }
