"""Chunks of prompts under a sparse pattern: what the pattern is shown, and its index run where keys lie.

Knows nothing about models or requests.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView, PatternMemory, Skipping, TellsHeads
from mmserve.attention.density import Pairs, pairs_of
from mmserve.attention.patterns.reuse import reused_index
from mmserve.attention.probe import Probe
from mmserve.attention.rules import DENSE_ABOVE, Rules
from mmserve.attention.tiles import head_by_head, tile_rows_for
from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.prefill_attention import AttentionIndex, Partial, prefill_attention
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, PageTable


@dataclass(slots=True, kw_only=True)
class PromptPattern:
    """The pattern of one prompt, None being dense, and what is known of it, for all its chunks and layers."""

    pattern: AttentionPattern | None
    rules: Rules
    reuse_every: int = 1  # layers that see what the first of them found
    probe: Probe | None = None  # where somebody asks what is lost
    memory: PatternMemory = field(default_factory=dict)
    # pairs of a row and a key by layer: computed, and those of dense attention
    _computed: dict[int, Tensor | int] = field(default_factory=lambda: defaultdict(int))
    _dense: dict[int, Tensor | int] = field(default_factory=lambda: defaultdict(int))

    def count(self, layer: int, computed: Tensor | int, dense: Tensor | int) -> None:
        """Add to what was computed in a layer; nobody waits for tensors."""
        self._computed[layer] += computed
        self._dense[layer] += dense

    def density(self, layers: int) -> tuple[float, ...]:
        """Of every layer, the share of dense attention that was computed; waits for the device."""
        return tuple(
            float(self._computed[layer]) / float(self._dense[layer]) if layer in self._dense else 1.0
            for layer in range(layers)
        )


class SlotKinds(NamedTuple):
    """What the slots of a prompt are, each [S]; as in `ChunkView`."""

    is_visual: NDArray[np.bool_]
    item: IntArray
    frame: IntArray


class SparseRows(NamedTuple):
    """What a chunk needs for a pattern; `is_end`: its last row is the prompt's."""

    prompt: PromptPattern
    kinds: SlotKinds
    is_end: bool


class SparseChunk:
    """The last `rows` slots of one sequence, all of whose heads are alike, layer after layer."""

    def __init__(
        self, table: PageTable, store: PageStore, sequence: str, rows: int, sparse: SparseRows
    ) -> None:
        self._table, self._store, self._sequence = table, store, sequence
        self._prompt, self._kinds, self._is_end = sparse
        self._slots, self._rows = len(self._kinds.is_visual), rows
        self._places = np.arange(self._slots - rows, self._slots, dtype=np.int32)
        self._first = table.runs(sequence).first  # [runs, layers, heads]

    def attend(self, layer: int, q: Tensor) -> Tensor | None:
        """Outputs of the leading rows of q [rows, Hq, d] that the pattern takes; None where all are dense."""
        prompt, heads = self._prompt, q.shape[1]
        taken = 0
        if prompt.pattern is not None:
            visual = self._kinds.is_visual
            taken = prompt.rules.sparse_rows(layer, visual, self._rows, is_end=self._is_end)
        found = None
        if taken or prompt.probe is not None:
            keys, values = self._kv(layer)
            q = q.to(keys.dtype).contiguous()
            seen = self._seen(layer, q[:taken], keys, values) if taken else None
            index, threshold = (seen.index, seen.threshold) if isinstance(seen, Skipping) else (seen, 0.0)
            pairs = None if index is None else pairs_of(index)
            if pairs is not None and threshold == 0.0 and _is_dense(pairs):
                index = None
            if index is not None and pairs is not None:
                found = self._run(layer, q[:taken], keys, values, index, threshold)
                prompt.count(layer, *pairs)
            if prompt.probe is not None:
                prompt.probe.add(layer, q, keys, values, index, None if found is None else found.lse)
        first = self._slots - self._rows + (0 if found is None else taken)
        by_rule = heads * (_triangle(self._slots) - _triangle(first))
        prompt.count(layer, by_rule, by_rule)
        return None if found is None else found.out

    def _seen(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> AttentionIndex | Skipping | None:
        assert self._prompt.pattern is not None, "only a pattern takes rows"
        view = ChunkView(
            layer=layer,
            layers=self._table.layers,
            queries=queries,
            keys=keys,
            values=values,
            rows=self._places[: len(queries)],
            is_visual=self._kinds.is_visual,
            item=self._kinds.item,
            frame=self._kinds.frame,
            tile_rows=tile_rows_for(self._store.k),
            memory=self._prompt.memory,
        )
        pattern, probe = self._prompt.pattern, self._prompt.probe
        if probe is not None and probe.layer == layer and isinstance(pattern, TellsHeads):
            probe.chosen = pattern.of_head(view, probe.head)
        return reused_index(pattern, view, self._prompt.reuse_every)

    def _run(
        self, layer: int, q: Tensor, keys: Tensor, values: Tensor, index: AttentionIndex, threshold: float
    ) -> Partial:
        scale, width = q.shape[2] ** -0.5, q.shape[2]
        is_plain = index.key_order is None and index.key_slot is None
        if keys.stride(1) == width or not is_plain or backend_for(q.device) == "naive":
            return prefill_attention(q, keys, values, index, scale=scale, skip_threshold=threshold)
        # the tensor memory accelerator reads axes of one head
        heads = keys.shape[1]
        begin = torch.from_numpy(self._first[0, layer]).to(q.device)
        k, v = (pages.view(-1, 1, width) for pages in (self._store.k, self._store.v))
        found = prefill_attention(
            q.view(len(q) * heads, -1, width),
            k,
            v,
            head_by_head(index, begin, group=q.shape[1] // heads),
            scale=scale,
            skip_threshold=threshold,
        )
        return Partial(found.out.view(q.shape), found.lse.view(q.shape[:2]))

    def _kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S, kv_heads, d] of a layer: in place, if each head's slots are one run."""
        assert (self._table.lengths(self._sequence)[layer] == self._slots).all(), "slots are the rows so far"
        first, width = self._first[0, layer], self._store.k.shape[-1]
        steps = np.unique(np.diff(first))
        # heads at equal distances are one view; those of a sequence whose pages were reserved at once are
        if len(self._first) > 1 or len(steps) > 1 or (steps < 0).any():
            return self._store.read(self._table.slots(self._sequence, layer).T)
        step = int(steps[0]) if len(steps) else 1
        shape, strides = (self._slots, len(first), width), (width, step * width, 1)
        k, v = (
            pages.as_strided(shape, strides, pages.storage_offset() + int(first[0]) * width)
            for pages in (self._store.k, self._store.v)
        )
        return k, v


def _is_dense(pairs: Pairs) -> bool:
    """Whether a dense pass is quicker than these pairs; on a GPU both are one kernel: nobody waits to ask."""
    if pairs.dense.device.type != "cpu":
        return False
    return int(pairs.computed) > DENSE_ABOVE * int(pairs.dense)


def _triangle(rows: int) -> int:
    return rows * (rows + 1) // 2
