"""Steps of decodes alone as CUDA graphs: captured once per size, replayed from then on.

A graph repeats its launches with the same addresses and shapes, so everything that differs from step to
step is written into `StepInputs` before. Knows nothing about plans, prompts or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmserve.attention.cuda import PAGE_STEP, ROW_STEP, append, decode_attention
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.fused import Rotation, fused_forward

MAX_ROWS = 64

Step = Callable[[], Tensor]  # from what is in its inputs to logits
Capture = Callable[[Step], Step]


class Size(NamedTuple):
    """What a graph is captured for: powers of two, so that a growing sequence needs few."""

    rows: int
    pages: int  # of one head

    @classmethod
    def that_fits(cls, rows: int, pages: int) -> Size:
        return cls(_power(rows), max(_power(pages), PAGE_STEP))


class StepInputs:
    """The inputs of one captured step: int32, filled on the host, then copied to where the step reads them.

    Rows that no sequence has are padding: they have no slots, so they read and write none.
    """

    def __init__(self, table: PageTable, store: PageStore, size: Size) -> None:
        self._table, device = table, store.k.device
        layers, heads = table.layers, table.kv_heads
        rows = max(size.rows, ROW_STEP)
        shapes = ((layers, rows, heads, size.pages), (layers, rows, heads), (rows,), (rows,))
        sizes = [int(np.prod(shape)) for shape in shapes]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._small = slice(sizes[0], None)  # all but the pages
        host, there = (
            [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes, strict=True)]
            for buffer in (self._host, self._there)
        )
        arrays: list[IntArray] = [part.numpy() for part in host]
        self._host_pages, self._host_lengths, self._host_tokens, self._host_positions = arrays
        self.pages, self.lengths = there[0][:, : size.rows], there[1][:, : size.rows]
        self.tokens, self.positions = there[2][: size.rows], there[3][: size.rows]
        self._versions: list[int | None] = [None] * size.rows  # of the pages in each row
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, sequences: Sequence[str], tokens: Sequence[int], positions: IntArray) -> None:
        """Rows of sequences whose new slot was appended before; the copy is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before, which is long over
        count = len(sequences)
        self._host_tokens[:count], self._host_tokens[count:] = tokens, 0
        self._host_positions[:count], self._host_positions[count:] = positions, 0
        self._host_lengths[:, count:] = 0
        for row, name in enumerate(sequences):
            self._host_lengths[:, row] = self._table.lengths(name)
        if self._turn_pages(sequences):
            self._there.copy_(self._host, non_blocking=True)
        else:
            self._there[self._small].copy_(self._host[self._small], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _turn_pages(self, sequences: Sequence[str]) -> bool:
        """Whether pages differ from those of the step before; they rarely do, and are most of the bytes."""
        differ = False
        for row, name in enumerate(sequences):
            version = self._table.version(name)
            if version != self._versions[row]:
                pages = self._table.pages(name)
                self._host_pages[:, row, :, : pages.shape[2]] = pages
                self._versions[row], differ = version, True
        return differ

    def slots(self) -> Tensor:
        """Where each row's own K and V go: its last slot in every head, int64 [layers, kv_heads, rows]."""
        page_size, last = self._table.page_size, self.lengths.long() - 1
        pages = self.pages.gather(3, (last // page_size).clamp(min=0)[..., None])[..., 0]
        slots = torch.where(last < 0, -1, pages * page_size + last % page_size)
        return slots.transpose(1, 2).contiguous()


class GraphPool:
    """Captures steps; their graphs share one pool of memory, so only the newest output is valid."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Step) -> Step:
        """What is returned launches all that `step` launches, and gives the same output tensor each time."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            step()  # compiles kernels and sets up libraries, which cannot be captured
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads of this process may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Runs one new token of each of up to `MAX_ROWS` sequences through the decoder."""

    def __init__(
        self, decoder: TextDecoder, table: PageTable, store: PageStore, capture: Capture | None = None
    ) -> None:
        self._decoder, self._table, self._store = decoder, table, store
        self._capture = capture or GraphPool().capture
        self._captured: dict[Size, tuple[StepInputs, Step]] = {}

    @torch.inference_mode()
    def run(self, sequences: Sequence[str], tokens: Sequence[int], positions: IntArray) -> Tensor:
        """fp32 logits [n, V]; the slots of the new tokens were appended to the table before."""
        pages = max(self._table.pages(name).shape[2] for name in sequences)
        size = Size.that_fits(len(sequences), pages)
        if size in self._captured:
            inputs, replay = self._captured[size]
            inputs.fill(sequences, tokens, positions)
        else:
            inputs = StepInputs(self._table, self._store, size)
            inputs.fill(sequences, tokens, positions)
            replay = self._capture(lambda: self._step(inputs))
            self._captured[size] = inputs, replay
        # the next replay writes where this one did
        return replay()[: len(sequences)].clone()

    def _step(self, inputs: StepInputs) -> Tensor:
        """To run it twice on the same inputs is to run it once."""
        slots, decoder, store = inputs.slots(), self._decoder, self._store

        def attend(layer: int, qkv: Tensor, rotation: Rotation) -> Tensor:
            q = append(qkv, rotation, slots[layer], store)
            return decode_attention(q, store, inputs.pages[layer], inputs.lengths[layer])

        hidden = fused_forward(decoder, decoder.embed(inputs.tokens), inputs.positions, attend)
        return decoder.logits(hidden)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
