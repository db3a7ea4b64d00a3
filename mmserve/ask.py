"""`mmserve ask`: one conversation, streamed to a terminal or reported as JSON.

Knows nothing about options; the command line has checked them.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import typer

from mmserve.batch.questions import is_url, media_part
from mmserve.errors import BadRequest, MMServeError, NotFound
from mmserve.request import Chunk, RequestOutput
from mmserve.sampling import SamplingParams

if TYPE_CHECKING:
    from mmserve.generation import Deliver

Json = dict[str, Any]


class Cancels(Protocol):
    def cancel(self) -> None: ...


class Submits(Protocol):
    """The part of `LLM` that is used here."""

    def submit(
        self,
        messages: Sequence[Json],
        sampling_params: SamplingParams,
        *,
        deliver: Deliver,
        report_tokens: bool = False,
        report_attention: bool = False,
    ) -> Cancels: ...


def messages(sources: Sequence[str], question: str) -> list[Json]:
    """One user message: the media in order, then the question."""
    for source in sources:
        if not is_url(source) and not Path(source).is_file():
            raise NotFound(f"Expected a file or a URL, but there is no file at {source}")
    if not question.strip() or Path(question[:255]).is_file():
        raise BadRequest(f"Expected a question after the media, but got {question!r}")
    parts = [*map(media_part, sources), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def ask(
    llm: Submits,
    conversation: Sequence[Json],
    *,
    max_tokens: int,
    as_json: bool,
    report_tokens: bool = False,
    report_attention: bool = False,
) -> RequestOutput:
    """Print the answer as it comes and a line about it, or the whole document; raises the request's error."""
    news: queue.SimpleQueue[Chunk | RequestOutput | MMServeError] = queue.SimpleQueue()
    generation = llm.submit(
        conversation,
        SamplingParams(max_tokens=max_tokens),
        deliver=news.put,
        report_tokens=report_tokens,
        report_attention=report_attention,
    )
    try:
        while isinstance(latest := news.get(), Chunk):
            if not as_json:
                typer.echo(latest.text, nl=False)
    except BaseException:
        generation.cancel()
        raise
    if isinstance(latest, MMServeError):
        raise latest
    if as_json:
        typer.echo(json.dumps(document(latest), ensure_ascii=False))
    else:
        typer.echo()
        typer.echo(summary(latest), err=True)
    return latest


def document(done: RequestOutput) -> Json:
    """The JSON document of a finished request."""
    (answer,) = done.outputs
    return {
        "answer": answer.text,
        "finish_reason": str(answer.finish_reason),
        "usage": msgspec.to_builtins(done.usage),
        "attention_density": list(done.usage.attention_density),
        "media": [msgspec.to_builtins(media) for media in done.media],
        "timings_ms": msgspec.to_builtins(done.timings_ms),
        "methods": msgspec.to_builtins(done.methods),
    }


def summary(done: RequestOutput) -> str:
    """One line: what went in, what it became, and where the time went."""
    usage, timings = done.usage, done.timings_ms
    frames = sum(media.frames for media in done.media)
    lost = sum(media.lost_frames for media in done.media)
    parts = [f"{frames} frame{'' if frames == 1 else 's'}" + (f" ({lost} lost)" if lost else "")]
    per_layer = usage.visual_tokens_layer_mean  # fewer than enter, where a method acts inside the model
    inner = f" ({per_layer:.0f} per layer)" if 0 < per_layer < usage.visual_tokens_kept else ""
    parts.append(f"{usage.visual_tokens} → {usage.visual_tokens_kept} visual tokens{inner}")
    if done.methods.attention != "dense":
        parts.append(f"attention {100 * fmean(usage.attention_density or (1.0,)):.0f} %")
    parts.append(f"KV {usage.kv_bytes_dense / 2**20:.1f} → {usage.kv_bytes / 2**20:.1f} MiB")
    stages = ("decode", "encode", "prefill", "ttft", "generate", "total")
    parts.append(", ".join(f"{stage} {getattr(timings, stage):.0f} ms" for stage in stages))
    return " | ".join(parts)
