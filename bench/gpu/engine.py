"""Prefill and decode steps of our decoder at the sizes of real models, weights made on the device.

Only the language model, on random embeddings: what is measured is one runner's steps, with and without
CUDA graphs, from plan to sampled ids.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention
from mmserve.bench.bound import step_bytes
from mmserve.bench.geometry import geometry
from mmserve.bench.gpu.measure import Session, random
from mmserve.bench.pairing import Metric, alternate
from mmserve.engine.graphs import DecodeGraphs
from mmserve.engine.rows import DecodeRow, PromptRows
from mmserve.engine.runner import Runner
from mmserve.engine.scheduler import Chunk, Plan
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import DecoderConfig, TextDecoder

BANDWIDTH_GATES = {"ov-7b": 0.75, "ov-0.5b": 0.4}  # of a step at batch 1
PAGE_SIZE = 32
CHECKED_LAYERS, CHECKED_STEPS = 2, 4
EXACT_TOLERANCE = 2e-3  # of logits near 1, in fp32
NEAR_TOLERANCE = 0.05  # of the logits' root mean square, in bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    geometries: tuple[str, ...] = ("ov-0.5b", "ov-7b")
    context: int = 6336  # 32 frames and a question
    batches: tuple[int, ...] = (1, 16)
    steps: int = 32  # of one timed run
    checked_rows: int = 200


SMOKE = Sizes(geometries=("nano",), context=8, batches=(1, 3), steps=1, checked_rows=6)


def run(session: Session) -> None:
    sizes = SMOKE if session.is_smoke else Sizes()
    for name in sizes.geometries:
        if not session.has_time(name):
            return
        config = text_config(name)
        checked = replace(config, layers=min(config.layers, CHECKED_LAYERS))
        _check_exactly(session, name, make_decoder(checked, session, torch.float32), sizes.checked_rows)
        decoder = make_decoder(config, session, session.dtype)
        _check_nearly(session, name, decoder, sizes.checked_rows)
        _prefill(session, name, decoder, sizes.context)
        for batch in sizes.batches:
            if session.has_time(f"{name}_decode_{batch}"):
                _decode(session, name, decoder, batch, sizes)


def text_config(name: str) -> DecoderConfig:
    """The Qwen2 of a geometry."""
    sizes = geometry(name)
    text = sizes.text
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tied=sizes.tied,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


def make_decoder(config: DecoderConfig, session: Session, dtype: torch.dtype) -> TextDecoder:
    """Random weights that keep every activation near 1."""
    with torch.device("meta"):
        decoder = TextDecoder(config).to(dtype)
    decoder.to_empty(device=session.device)
    generator = torch.Generator(session.device).manual_seed(0)
    for name, weight in decoder.named_parameters():
        weight.requires_grad_(False)
        if weight.ndim == 1:
            weight.fill_(1.0 if "norm" in name else 0.0)
        else:
            added = any(part in name for part in ("o_proj", "down_proj"))
            scale = (2 * config.layers) ** -0.5 if added else 1.0
            weight.normal_(std=scale * weight.shape[1] ** -0.5, generator=generator)
    return decoder.eval()


class Steps:
    """Sequences of random prompts on a runner of their own; each decode feeds its best next token."""

    def __init__(
        self,
        session: Session,
        decoder: TextDecoder,
        slots: int,
        *,
        attention: type[PagedAttention] = CudaAttention,
        graphs: bool = False,
    ) -> None:
        config, self._session = decoder.config, session
        pages = -(-slots // PAGE_SIZE) * config.layers * config.kv_heads
        table = PageTable(config.layers, config.kv_heads, pages, PAGE_SIZE)
        self._dtype = decoder.embed_tokens.weight.dtype
        store = PageStore(pages, PAGE_SIZE, config.head_dim, self._dtype, str(session.device))
        self.runner = Runner(decoder, table, store, session.device)
        self.runner.attention = attention
        # on a CPU the step itself stands for its graph
        capture = None if session.device.type == "cuda" else lambda step: step
        self._captured = DecodeGraphs(decoder, table, store, capture)
        self.use_graphs(graphs)
        self._rows: dict[str, DecodeRow] = {}

    def use_graphs(self, use: bool) -> None:
        self.runner.graphs = self._captured if use else None

    def prefill(self, name: str, rows: int, headroom: int = 0, chunk: int | None = None) -> Tensor:
        """Logits of the last row; `headroom` pages are reserved for decodes."""
        places, width = np.arange(rows, dtype=np.int32), self.runner.decoder.config.hidden_size
        prompt = PromptRows(
            embeddings=random((rows, width), self._session, 5).to(self._dtype),
            order=places,
            position=places,
            is_visual=np.zeros(rows, np.bool_),
        )
        self.runner.add(name, prompt, headroom=headroom)
        for start in range(0, rows, chunk or rows):
            stop = min(start + (chunk or rows), rows)
            logits = self.runner.run(Plan(decodes=(), chunks=(Chunk(name, start, stop),)), {}).logits
        self.runner.finish_prompt(name)
        self._rows[name] = DecodeRow(int(logits.argmax()), rows, rows)
        return logits

    def decode(self) -> Tensor:
        """One step of all sequences, to the ids on the host."""
        logits = self.runner.run(Plan(decodes=tuple(self._rows), chunks=()), self._rows).logits
        for row, token in zip(self._rows.values(), logits.argmax(-1).tolist(), strict=True):
            row.token, row.order, row.position = token, row.order + 1, row.position + 1
        return logits

    def feed(self, tokens: int) -> None:
        """Another side may have chosen another token of nearly the same score."""
        for row in self._rows.values():
            row.token = tokens

    def release(self, name: str) -> None:
        del self._rows[name]
        self.runner.release(name)


def _sides(session: Session, decoder: TextDecoder, rows: int) -> dict[str, Steps]:
    slots = 2 * (rows + CHECKED_STEPS + 2 * PAGE_SIZE)
    make = partial(Steps, session, decoder, slots)
    return {
        "plain": make(attention=PagedAttention),
        "kernels": make(),
        "graphs": make(graphs=True),
    }


def _outputs(steps: Steps, rows: int) -> Tensor:
    """Logits after a prompt in two chunks and after steps of two sequences that are fed the same."""
    found = [steps.prefill(name, rows - at, chunk=rows * 2 // 3) for at, name in enumerate("ab")]
    for token in range(CHECKED_STEPS):
        steps.feed(token)
        found.append(steps.decode())
    return torch.cat(found)


def _check_exactly(session: Session, name: str, decoder: TextDecoder, rows: int) -> None:
    found = {side: _outputs(steps, rows) for side, steps in _sides(session, decoder, rows).items()}
    for side in ("kernels", "graphs"):
        what = f"{name}: logits of {decoder.config.layers} layers in fp32, {side}"
        session.check(what, found[side], found["plain"], EXACT_TOLERANCE)


def _check_nearly(session: Session, name: str, decoder: TextDecoder, rows: int) -> None:
    """Rounding adds up over the layers, so the mean over all logits is what counts."""
    sides = _sides(session, decoder, rows).items()
    found = {side: _outputs(steps, rows).float() for side, steps in sides}
    expected = found["plain"]
    for side in ("kernels", "graphs"):
        error = (found[side] - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        what = f"{name}: mean error of all layers as timed, {side}"
        session.check(what, error, torch.zeros_like(error), NEAR_TOLERANCE)


def _prefill(session: Session, name: str, decoder: TextDecoder, context: int) -> None:
    sides = {
        "ours": Steps(session, decoder, context + PAGE_SIZE),
        "peer": Steps(session, decoder, context + PAGE_SIZE, attention=PagedAttention),
    }

    def prefill(steps: Steps) -> None:
        steps.prefill("a", context)
        steps.release("a")

    taken = session.times(f"{name} prefill", {side: partial(prefill, steps) for side, steps in sides.items()})
    ours, peer = ([s * 1e3 for s in taken[side]] for side in ("ours", "peer"))
    metric = Metric(name=f"{name}_prefill_{context}", unit="ms")
    session.add(metric, ours, peer, peer_is="the same decoder with gathered pages and SDPA")


def _decode(session: Session, name: str, decoder: TextDecoder, batch: int, sizes: Sizes) -> None:
    total = (2 * session.rounds + 4) * sizes.steps
    steps = Steps(session, decoder, batch * (sizes.context + total + PAGE_SIZE))
    for row in range(batch):
        steps.prefill(str(row), sizes.context, headroom=total)

    def step_ms(use_graphs: bool, _: int) -> float:
        steps.use_graphs(use_graphs)
        started_at = time.perf_counter()
        for _ in range(sizes.steps):
            steps.decode()  # waits for its ids
        return (time.perf_counter() - started_at) / sizes.steps * 1e3

    for use_graphs in (True, False):
        step_ms(use_graphs, 0)  # captures and compiles
    taken = alternate({"ours": partial(step_ms, True), "peer": partial(step_ms, False)}, session.rounds)
    session.add(
        Metric(name=f"{name}_decode_{batch}", unit="ms/step"),
        taken["ours"],
        taken["peer"],
        peer_is="the same without graphs",
    )
    read = step_bytes(decoder.config, batch, sizes.context, session.dtype.itemsize)
    rates = [read / step / 1e6 for step in taken["ours"]]
    gate = BANDWIDTH_GATES.get(name) if batch == 1 else None
    metric = Metric(name=f"{name}_decode_{batch}_vs_bandwidth", unit="GB/s", more_is_better=True, gate=gate)
    bandwidth = [session.bandwidth() / 1e9] * session.rounds
    session.add(metric, rates, bandwidth, peer_is="measured copy bandwidth")
    session.tell(f"{name} decode {batch}: {rates[0]:.4g} GB/s")
