"""Oracles of index building: fp32 torch, any device, whole score matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Probe(NamedTuple):
    """Sums of the attention weights of some last rows, fp32 [Hq, S]."""

    vertical: Tensor  # by key
    slash: Tensor  # by how far the key stands before the row


class Residues(NamedTuple):
    """The best class of each stride, [Hq, strides]."""

    lift: Tensor  # fp32: its share of the mass above an equal share
    residue: Tensor  # int32


class Columns(NamedTuple):
    """Single keys that a block of rows should see."""

    columns: Tensor  # int32 [Hq, blocks, capacity], ascending; undefined from its count on
    counts: Tensor  # int32 [Hq, blocks]


def probe(q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None, *, scale: float) -> Probe:
    """As `pattern_index.probe`."""
    rows, keys = len(q), len(k)
    scores = scores_of(q, k, scale).masked_fill(_hidden(row_order, key_order, keys), -torch.inf)
    # a row that sees nothing has weights of nan
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    slash = torch.zeros(len(weights), keys, device=q.device)
    for row in range(rows):
        place = keys - rows + row
        slash[:, : place + 1] += weights[:, row, : place + 1].flip(-1)
    return Probe(weights.sum(1), slash)


def residue_scores(vertical: Tensor, strides: Tensor, *, first: int, last: int) -> Residues:
    """As `pattern_index.residue_scores`."""
    inner = torch.zeros_like(vertical)
    inner[:, first:last] = vertical[:, first:last]
    lifts, residues = [], []
    for stride in strides.tolist():
        whole = inner.shape[1] // stride * stride
        classes = inner[:, :whole].reshape(len(inner), -1, stride).sum(1)
        best = classes.max(1)
        total = classes.sum(1)
        lifts.append(torch.where(total > 0, best.values / total.clamp(min=1e-30), 0.0) - 1 / stride)
        residues.append(best.indices.int())
    return Residues(torch.stack(lifts, 1), torch.stack(residues, 1))


def block_scores(
    q: Tensor,
    k: Tensor,
    row_order: Tensor,
    key_order: Tensor | None,
    *,
    block: int,
    key_block: int | None = None,
    scale: float,
) -> Tensor:
    """As `pattern_index.block_scores`."""
    key_block = key_block or block
    scores = scores_of(pool_rows(q, block), pool_rows(k, key_block), scale)
    places = torch.arange(0, len(k), key_block, device=k.device)
    first_keys = places if key_order is None else key_order[places]
    return scores.masked_fill(first_keys > last_orders(row_order, block)[:, None], -torch.inf)


def select_columns(
    q: Tensor,
    k: Tensor,
    row_order: Tensor,
    key_order: Tensor | None,
    key_end: Tensor,
    *,
    block: int,
    scale: float,
    alpha: float,
    sink: int,
    capacity: int,
) -> Columns:
    """As `pattern_index.select_columns`; entries past a count are 0."""
    scores = scores_of(pool_rows(q, block), k, scale)
    hidden = _hidden(last_orders(row_order, block), key_order, len(k))
    scores = scores.masked_fill(hidden, -torch.inf)
    kept = (scores >= scores.amax(-1, keepdim=True) - alpha) & ~hidden
    place = torch.arange(len(k), device=k.device)
    kept &= (place >= sink) & (place < key_end[:, None])
    counts = kept.sum(-1).clamp(max=capacity).int()
    columns = torch.zeros(*counts.shape, capacity, dtype=torch.int32, device=k.device)
    for head, blocks in enumerate(kept):
        for at, row in enumerate(blocks):
            found = row.nonzero().flatten()[:capacity]
            columns[head, at, : len(found)] = found.int()
    return Columns(columns, counts)


def pool_rows(x: Tensor, block: int) -> Tensor:
    """Means over blocks of rows of x [N, H, d], the last one as long as it is: fp32 [blocks, H, d]."""
    return torch.stack([part.mean(0) for part in x.float().split(block)])


def last_orders(row_order: Tensor, block: int) -> Tensor:
    """The order of the last row of each block."""
    ends = torch.arange(block, len(row_order) + block, block, device=row_order.device)
    return row_order[ends.clamp(max=len(row_order)) - 1]


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """fp32 [Hq, rows, keys]; query head h reads KV head h // (Hq / Hkv)."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    return torch.einsum("rhgd,khd->hgrk", grouped, k.float()).flatten(0, 1) * scale


def _hidden(row_order: Tensor, key_order: Tensor | None, keys: int) -> Tensor:
    """Which rows do not see which keys, bool [rows, keys]."""
    key_order = torch.arange(keys, device=row_order.device) if key_order is None else key_order
    return key_order > row_order[:, None]
