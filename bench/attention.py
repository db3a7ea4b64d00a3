"""`mmserve bench attention`: one layer's attention over a long video under a sparse pattern, beside dense.

Queries and keys are noise with a grid in it, as in a model's grid heads: the place of one patch in every
frame is looked at. Chunks come as in serving, keys lie as in pages, and what the pattern takes to build its
index counts. Knows nothing about models, prompts or what a pattern is worth: `mmserve eval` says that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView, PatternMemory, Skipping, make_pattern
from mmserve.attention.density import pairs_of
from mmserve.attention.tiles import tile_rows_for
from mmserve.bench.geometry import geometry
from mmserve.bench.pairing import Json, Metric, alternate_telling, row
from mmserve.bench.report import Tell, deliver, document
from mmserve.cores import usable_cores
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import cpu as native
from mmserve.kernels.prefill_attention import dense_index, prefill_attention
from mmserve.request import Option

CHUNK_ROWS = 512
FRAME_TOKENS = 196
TEXT_BEFORE = 14
LIFTED_SCORE = 9.0  # of keys at the place that is looked at, where others are normal
GATED_GEOMETRY, GATED_ATTENTION = "ov-mini", "mminference"
# how many times dense attention's speed at so many visual tokens
GATES = {16384: 1 / 0.45, 32768: 1 / 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    attention: str = GATED_ATTENTION
    options: Mapping[str, Option] = field(default_factory=dict)
    profile: str | None = None
    geometry: str = GATED_GEOMETRY
    tokens: tuple[int, ...] = (16384, 32768)  # of vision
    rounds: int = 5
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        geometry(self.geometry)
        make_pattern(self.attention, self.profile, **self.options)
        if not self.tokens or min(self.tokens) < FRAME_TOKENS:
            raise BadRequest(f"Expected prompts of at least {FRAME_TOKENS} tokens, but got {self.tokens}")


def read_tokens(text: str) -> tuple[int, ...]:
    """A comma list of numbers."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise BadRequest(f"Expected numbers of tokens, a comma between them, but got {text!r:.40}") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    q: Tensor  # [S, Hq, d]
    k: Tensor  # [Hkv, S, d], as pages lie
    v: Tensor
    frame: np.ndarray[Any, np.dtype[np.int32]]  # [S]

    def __len__(self) -> int:
        return len(self.q)


def run(plan: Plan, tell: Tell = lambda line: None) -> Json:
    torch.set_num_threads(plan.threads or usable_cores())
    rows: list[Json] = []
    with torch.inference_mode():
        for tokens in plan.tokens:
            rows += measure(plan, tokens, tell)
    settings = {item.name: getattr(plan, item.name) for item in fields(plan)}
    return document("attention", settings, rows)


def command(plan: Plan, json_out: Path | None) -> None:
    deliver(lambda tell: run(plan, tell=tell), json_out)


def measure(plan: Plan, tokens: int, tell: Tell) -> list[Json]:
    """The rows of one length."""
    prompt = planted(plan, tokens)
    pattern = make_pattern(plan.attention, plan.profile, **plan.options)
    index_ms: list[float] = []

    def ours(_: int) -> float:
        seconds, spent = run_pattern(prompt, pattern)
        index_ms.append(spent * 1e3)
        return seconds * 1e3

    name = f"attention_{tokens}"
    sides = {"with": ours, "without": lambda _: run_dense(prompt) * 1e3}
    # the first of each loads what it runs
    short = cut(prompt, min(len(prompt), 4 * CHUNK_ROWS))
    run_pattern(short, pattern)
    run_dense(short)
    taken = alternate_telling(name, sides, plan.rounds, tell)
    is_gated = (plan.geometry, plan.attention) == (GATED_GEOMETRY, GATED_ATTENTION) and not plan.options
    gate = GATES.get(tokens) if is_gated else None
    index = Metric(name=f"{name}_index", unit="ms")
    return [
        row(
            Metric(name=name, unit="ms", gate=gate), taken["with"], taken["without"], **lost(prompt, pattern)
        ),
        row(index, index_ms, peer_is="part of the row above"),
    ]


def planted(plan: Plan, tokens: int) -> Prompt:
    """Noise with a direction in each head, which one patch of every frame has and all rows look for."""
    sizes = geometry(plan.geometry).text
    heads, kv_heads, width = (
        sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    generator = torch.Generator().manual_seed(plan.seed)
    total = TEXT_BEFORE + tokens
    q, k, v = (
        torch.randn(*shape, width, generator=generator)
        for shape in ((total, heads), (kv_heads, total), (kv_heads, total))
    )
    frame = np.full(total, -1, np.int32)
    frame[TEXT_BEFORE:] = np.arange(tokens) // FRAME_TOKENS
    strength = (LIFTED_SCORE / width**0.5) ** 0.5
    place = torch.arange(total) - TEXT_BEFORE
    for head in range(kv_heads):
        direction = torch.randn(width, generator=generator).sign() * strength
        is_line = (place >= 0) & (place % FRAME_TOKENS == FRAME_TOKENS * (head + 1) // (kv_heads + 1))
        k[head, is_line] += direction
        group = heads // kv_heads
        q[:, head * group : (head + 1) * group] += direction
    return Prompt(q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16(), frame=frame)


def cut(prompt: Prompt, rows: int) -> Prompt:
    k, v = (part[:, :rows].contiguous() for part in (prompt.k, prompt.v))
    return Prompt(q=prompt.q[:rows], k=k, v=v, frame=prompt.frame[:rows])


def views(prompt: Prompt) -> Iterator[ChunkView]:
    memory: PatternMemory = {}
    is_visual = prompt.frame >= 0
    for start in range(0, len(prompt), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(prompt))
        yield ChunkView(
            layer=0,
            layers=1,
            queries=prompt.q[start:stop],
            keys=prompt.k[:, :stop].transpose(0, 1),
            values=prompt.v[:, :stop].transpose(0, 1),
            rows=np.arange(start, stop, dtype=np.int32),
            is_visual=is_visual[:stop],
            item=np.minimum(prompt.frame[:stop], 0),
            frame=prompt.frame[:stop],
            tile_rows=tile_rows_for(prompt.k),
            memory=memory,
        )


def run_pattern(prompt: Prompt, pattern: AttentionPattern) -> tuple[float, float]:
    """Seconds of all chunks, and of what of them the index took."""
    spent = 0.0
    started = time.perf_counter()
    for view in views(prompt):
        before = time.perf_counter()
        index = pattern.index(view)
        spent += time.perf_counter() - before
        if index is None:
            dense_chunk(prompt, view)
            continue
        found, threshold = (index.index, index.threshold) if isinstance(index, Skipping) else (index, 0.0)
        prefill_attention(
            view.queries, view.keys, view.values, found, scale=view.scale, skip_threshold=threshold
        )
    return time.perf_counter() - started, spent


def run_dense(prompt: Prompt) -> float:
    started = time.perf_counter()
    for view in views(prompt):
        dense_chunk(prompt, view)
    return time.perf_counter() - started


def dense_chunk(prompt: Prompt, view: ChunkView) -> Tensor:
    """What serving does with a chunk that no pattern takes."""
    if not native.is_available(view.queries, prompt.k):
        index = dense_index(
            [len(view.rows)], [len(view.keys)], q_heads=view.queries.shape[1], kv_heads=len(prompt.k)
        )
        return prefill_attention(view.queries, view.keys, view.values, index, scale=view.scale).out
    kv_heads, total, _ = prompt.k.shape
    begin = torch.arange(kv_heads + 1)
    return native.prefill_attention(
        view.queries[None],
        prompt.k,
        prompt.v,
        begin[:-1] * total,
        torch.full((kv_heads,), len(view.keys), dtype=torch.int32),
        begin,
        scale=view.scale,
        is_causal=True,
    )[0]


def lost(prompt: Prompt, pattern: AttentionPattern) -> dict[str, object]:
    """The share of dense attention that is computed, and of its weight that the last chunk sees."""
    computed = dense = 0
    recall = 1.0
    for view in views(prompt):
        rows, heads = view.queries.shape[:2]
        index = pattern.index(view)
        if index is None:
            every = heads * int((view.rows.astype(np.int64) + 1).sum())
            computed, dense = computed + every, dense + every
            continue
        found = index.index if isinstance(index, Skipping) else index
        pairs = pairs_of(found)
        computed, dense = computed + int(pairs.computed), dense + int(pairs.dense)
        if int(view.rows[-1]) + 1 == len(prompt):
            whole = dense_index([rows], [len(prompt)], q_heads=heads, kv_heads=len(prompt.k))
            lse = [
                prefill_attention(view.queries, view.keys, view.values, each, scale=view.scale).lse
                for each in (found, whole)
            ]
            recall = float((lse[0] - lse[1]).exp().clamp(max=1).mean())
    return {"density": round(computed / dense, 4), "recall": round(recall, 4)}
