"""Attention over paged KV on a CPU: pages that lie side by side are read where they lie.

Gathering the slots of a sequence first costs more than the attention itself. Knows nothing about
models or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.blocked import blocked_causal
from mmserve.attention.paged import PagedAttention, SequenceRows, Watch
from mmserve.attention.segmented import SegmentedPrompt
from mmserve.attention.selection import Selected
from mmserve.kernels.paged_decode.cpu import paged_decode
from mmserve.kernels.prefill_attention import cpu as native
from mmserve.kv.sequence import Runs
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable


class CpuAttention(PagedAttention):
    """The same results as `PagedAttention`, faster."""

    def __init__(
        self,
        table: PageTable,
        store: PageStore,
        batch: Sequence[SequenceRows],
        observe: Mapping[str, Sequence[int]] | None = None,
        layers: range | None = None,
        watch: Sequence[Watch] = (),
    ) -> None:
        super().__init__(table, store, batch, observe, layers, watch)
        self._runs = {rows.sequence: table.runs(rows.sequence) for rows in batch}
        self._prompt_runs = {
            rows.sequence: joined_runs([self._runs[rows.sequence]]) for rows in self._prompts
        }
        self._segmented = {
            rows.sequence: SegmentedPrompt(
                store,
                self._runs[rows.sequence],
                table.order(rows.sequence, 0, 0),
                rows.until,
                rows.stop - rows.start,
            )
            for rows in self._prompts
            if rows.until is not None
        }
        if self._decodes:
            self._decode_runs = joined_runs([self._runs[rows.sequence] for rows in self._decodes])

    def _prompt(self, layer: int, rows: SequenceRows, q: Tensor) -> Tensor:
        if rows.until is not None:
            is_alike = q.dtype is self._store.k.dtype
            return (
                self._segmented[rows.sequence].attend(layer, q)
                if is_alike
                else super()._prompt(layer, rows, q)
            )
        if native.is_available(q, self._store.k):
            width, runs = q.shape[-1], self._prompt_runs[rows.sequence]
            return native.prefill_attention(
                q[None],
                self._store.k.view(-1, width),
                self._store.v.view(-1, width),
                runs.first[layer],
                runs.length[layer],
                runs.begin,
                scale=width**-0.5,
                is_causal=True,
            )[0]
        keys, values = self._heads(layer, rows.sequence)
        grouped = q.unflatten(1, (len(keys), -1))  # [n, kv_heads, group, d]
        if q.dtype is keys[0].dtype is torch.bfloat16:
            heads = zip(grouped.unbind(1), keys, values, strict=True)
            return torch.cat([blocked_causal(*head) for head in heads], dim=1)
        if len({len(head) for head in keys}) > 1:
            return super()._prompt(layer, rows, q)
        shape = (*grouped.shape[1:3], -1, -1)
        out = functional.scaled_dot_product_attention(
            grouped.permute(1, 2, 0, 3),
            torch.stack(keys).to(q.dtype)[:, None].expand(*shape),
            torch.stack(values).to(q.dtype)[:, None].expand(*shape),
            attn_mask=None if len(q) == len(keys[0]) else _causal(len(q), len(keys[0])),
            is_causal=len(q) == len(keys[0]),
        )
        return out.flatten(0, 1).transpose(0, 1)

    def _heads(self, layer: int, sequence: str) -> tuple[list[Tensor], list[Tensor]]:
        """K and V [S, d] of every KV head of one layer, in place when its slots are one run."""
        runs = self._runs[sequence]
        first, length = runs.first[:, layer].T.tolist(), runs.length[:, layer].T.tolist()
        both = []
        for pages in (self._store.k, self._store.v):
            flat = pages.view(-1, pages.shape[-1])
            heads = []
            for begins, counts in zip(first, length, strict=True):
                parts = [flat[at : at + n] for at, n in zip(begins, counts, strict=True) if n]
                heads.append(parts[0] if len(parts) == 1 else torch.cat(parts))
            both.append(heads)
        return both[0], both[1]

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        if q.dtype is not self._store.k.dtype:
            return super()._decode(layer, q)
        width, runs = q.shape[-1], self._decode_runs
        found = self._selected(layer, self._decodes, q)
        if any(selected is not None for selected in found):
            first, length, begin = self._selected_runs(layer, found)
        else:
            first, length, begin = runs.first[layer], runs.length[layer], runs.begin
        return paged_decode(
            q,
            self._store.k.view(-1, width),
            self._store.v.view(-1, width),
            first,
            length,
            begin,
            scale=width**-0.5,
        )

    def _selected_runs(self, layer: int, found: Sequence[Selected | None]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the pages that decodes have selected, or of all; as `JoinedRuns` of one layer."""
        parts = []
        for rows, selected in zip(self._decodes, found, strict=True):
            runs = self._runs[rows.sequence]
            of_layer = runs.first[:, layer].T, runs.length[:, layer].T
            parts.append(of_layer if selected is None else selected.runs(self._table.page_size))
        counts = np.repeat([first.shape[1] for first, _ in parts], self._table.kv_heads)
        first, length = (np.concatenate([part[at].reshape(-1) for part in parts]) for at in range(2))
        begin = np.concatenate([[0], np.cumsum(counts)])
        return torch.from_numpy(first), torch.from_numpy(length), torch.from_numpy(begin)


class JoinedRuns(NamedTuple):
    """Runs of every (sequence, KV head), one after another."""

    first: Tensor  # int64 [layers, runs]
    length: Tensor  # int32 [layers, runs]
    begin: Tensor  # int64 [sequences * kv_heads + 1], where those of each begin


def joined_runs(sequences: list[Runs]) -> JoinedRuns:
    assert sequences, "there is a sequence"
    layers = sequences[0].first.shape[1]
    first = [runs.first.transpose(1, 2, 0).reshape(layers, -1) for runs in sequences]
    length = [runs.length.transpose(1, 2, 0).reshape(layers, -1) for runs in sequences]
    counts = [len(runs.first) for runs in sequences for _ in range(runs.first.shape[2])]
    begin = np.concatenate([[0], np.cumsum(counts)])
    arrays = np.concatenate(first, axis=1), np.concatenate(length, axis=1), begin
    # with one KV head what is concatenated is a transposed view, and so is the result
    return JoinedRuns(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


@lru_cache(maxsize=4)
def _causal(rows: int, keys: int) -> Tensor:
    """Which keys the last `rows` positions see, bool [rows, keys]."""
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
