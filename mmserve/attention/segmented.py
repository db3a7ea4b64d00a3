"""Prompts on a CPU whose slots are not seen by all later rows, segment by segment; see `visibility`.

In a segment attention is causal, over fewer keys than the sequence has: the same products as of ordinary
prompts, without those that a mask would throw away. Segments of one length, the frames of a video, are a
batch. Knows nothing about models or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mmserve.attention.blocked import blocked_causal
from mmserve.attention.visibility import Segment, segments
from mmserve.kernels.prefill_attention import cpu as native
from mmserve.kv.sequence import Runs
from mmserve.kv.store import PageStore
from mmserve.kv.table import IntArray, SlotArray


class SegmentedPrompt:
    """Attention of the last `rows` slots of one sequence, all of whose heads are alike."""

    def __init__(self, store: PageStore, runs: Runs, order: IntArray, until: IntArray, rows: int) -> None:
        self._older = len(order) - rows
        found = segments(order, until, rows)
        batches = [list(group) for _, group in groupby(found, lambda one: one.stop - one.start)]
        kind = _Stretches if store.k.dtype is torch.bfloat16 else _Padded
        self._batches = [(batch, kind(batch, store, runs)) for batch in batches]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Outputs like the rows' queries q [rows, Hq, d], which are of the store's dtype."""
        outs = []
        for batch, keys in self._batches:
            rows = q[batch[0].start - self._older : batch[-1].stop - self._older]
            outs.append(keys.attend(layer, rows.unflatten(0, (len(batch), -1))).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Padded:
    """Keys of segments of one length gathered side by side, as one masked product."""

    def __init__(self, batch: Sequence[Segment], store: PageStore, runs: Runs) -> None:
        self._store, self._first = store, runs.first
        rows = batch[0].stop - batch[0].start
        most = max(len(segment.seen) for segment in batch)
        slots = np.empty((len(batch), most + rows), np.int64)
        visible = np.zeros((len(batch), rows, most + rows), np.bool_)
        for at, segment in enumerate(batch):
            count = len(segment.seen)
            slots[at, :count] = segment.seen
            slots[at, count:most] = segment.start  # hidden, but finite
            slots[at, most:] = np.arange(segment.start, segment.stop)
            visible[at, :, :count] = True
        visible[..., most:] = np.tri(rows, dtype=np.bool_)
        self._run, self._offset = _found(slots, runs)
        self._visible = torch.from_numpy(visible)[:, None, None]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """From q [segments, rows, Hq, d]; KV heads of segments are the batch axis."""
        flat = self._first[self._run, layer] + self._offset[..., None]  # [segments, keys, kv_heads]
        k, v = self._store.read(flat.transpose(0, 2, 1))
        heads = k.shape[1]
        grouped = q.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        shape = (-1, grouped.shape[1], -1, -1)
        out = functional.scaled_dot_product_attention(
            grouped,
            k.flatten(0, 1)[:, None].expand(shape),
            v.flatten(0, 1)[:, None].expand(shape),
            attn_mask=self._visible.expand(-1, heads, -1, -1, -1).flatten(0, 1),
        )
        by_row: Tensor = out.unflatten(0, (-1, heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return by_row


class _Stretches:
    """Keys of segments of one length where they lie, for causal products in bf16."""

    def __init__(self, batch: Sequence[Segment], store: PageStore, runs: Runs) -> None:
        self._store, self._segments = store, len(batch)
        layers, heads = runs.first.shape[1:]
        firsts, lengths, counts = [], list[SlotArray](), list[int]()
        for segment in batch:
            slots = np.concatenate([segment.seen, np.arange(segment.start, segment.stop)])
            first, length = _stretches(slots, runs)
            firsts.append(first.transpose(1, 2, 0).reshape(layers, -1))
            lengths += [length] * heads
            counts += [len(length)] * heads
        # of every segment, of every KV head
        self._first = torch.from_numpy(np.ascontiguousarray(np.concatenate(firsts, axis=1)))
        self._length = torch.from_numpy(np.concatenate(lengths).astype(np.int32))
        self._begin = torch.from_numpy(np.cumsum([0, *counts]))

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """From q [segments, rows, Hq, d]."""
        if not native.is_available(q, self._store.k):
            return self._blocked(layer, q)
        width = q.shape[-1]
        return native.prefill_attention(
            q,
            self._store.k.view(-1, width),
            self._store.v.view(-1, width),
            self._first[layer],
            self._length,
            self._begin,
            scale=width**-0.5,
            is_causal=True,
        )

    def _blocked(self, layer: int, q: Tensor) -> Tensor:
        heads = (len(self._begin) - 1) // self._segments
        out = torch.empty_like(q)
        for at, slots in enumerate(self._slots(layer)):
            segment, head = divmod(at, heads)
            rows = q[segment].unflatten(1, (heads, -1))[:, head]
            out[segment].unflatten(1, (heads, -1))[:, head] = blocked_causal(rows, *self._store.read(slots))
        return out

    def _slots(self, layer: int) -> Iterator[Tensor]:
        """Flat slots of every segment, of every head."""
        first, length, begin = self._first[layer].tolist(), self._length.tolist(), self._begin.tolist()
        for start, stop in pairwise(begin):
            yield torch.cat([torch.arange(first[at], first[at] + length[at]) for at in range(start, stop)])


class _Stretch(NamedTuple):
    """Slots that lie side by side in every head."""

    first: SlotArray  # [stretches, layers, heads], flat
    length: SlotArray  # [stretches]


def _stretches(slots: SlotArray, runs: Runs) -> _Stretch:
    run, offset = _found(slots, runs)
    begins = np.flatnonzero((np.diff(slots, prepend=-2) != 1) | (np.diff(run, prepend=-1) != 0))
    first = runs.first[run[begins]] + offset[begins][:, None, None]
    return _Stretch(first, np.diff(begins, append=len(slots)))


def _found(slots: SlotArray, runs: Runs) -> tuple[NDArray[np.intp], SlotArray]:
    """The run that each slot is in, and its place there."""
    starts = np.cumsum([0, *runs.length[:-1, 0, 0].tolist()])
    run = np.searchsorted(starts, slots, side="right") - 1
    return run, slots - starts[run]
