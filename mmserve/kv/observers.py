"""What policies gather of a prompt while it is prefilled: small sums by layer, never all queries.

Sums are kept by order, so that slots may leave on the way. Knows nothing about policies or pages.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.kv.base import Rows, causal_attention, visible
from mmserve.models.rope import rope_angles, rotate

BLOCK_SCORES = 1 << 24  # of attention that are held at a time


class ByOrder:
    """Some numbers of every order of a prompt, fp32 [rows, orders], 0 at first."""

    def __init__(self) -> None:
        self._values: Tensor | None = None

    def add(self, order: NDArray[np.int32], values: Tensor) -> None:
        """Add [rows, n] to what is there for these ascending orders [n]."""
        self._grown(int(order[-1]) + 1, values)[:, torch.from_numpy(order).to(values.device)] += values

    def of(self, order: Tensor) -> Tensor:
        """[rows, n] of orders [n]."""
        assert self._values is not None, "something was added"
        return self._grown(int(order.max()) + 1, self._values)[:, order]

    def _grown(self, orders: int, like: Tensor) -> Tensor:
        values = self._values
        if values is None:
            values = self._values = like.new_zeros(len(like), orders, dtype=torch.float32)
        if values.shape[1] < orders:
            grown = values.new_zeros(len(values), max(orders, 2 * values.shape[1]))
            grown[:, : values.shape[1]] = values
            values = self._values = grown
        return values


class AttentionSums:
    """The attention each slot received: "attention" [kv_heads, S], a sum over rows and a mean over the heads
    of a group; "rows" [S] says how many rows could see it. If asked for, "entropy" is that of a row, the
    mean over rows and heads.
    """

    def __init__(self, *, with_entropy: bool = False) -> None:
        self._with_entropy = with_entropy
        self._entropy: dict[int, tuple[int, Tensor]] = {}  # by layer: rows, and the sum over them
        self._sums: dict[int, ByOrder] = {}  # by layer: heads, and last the rows

    def see(self, rows: Rows) -> None:
        keys, _ = rows.read()
        device = keys.device
        order, key_order = (torch.from_numpy(array).to(device) for array in (rows.order, rows.key_order))
        until = None if rows.key_until is None else torch.from_numpy(rows.key_until).to(device)
        size = max(BLOCK_SCORES // (rows.queries.shape[1] * len(key_order)), 1)
        found = keys.new_zeros(len(keys) + 1, len(key_order), dtype=torch.float32)
        for queries, orders in zip(rows.queries.split(size), order.split(size), strict=True):
            attention = causal_attention(queries, orders, keys, key_order, until)
            found[:-1] += attention.sum(-2).mean(1)
            found[-1] += visible(orders, key_order, until).sum(0)
            if self._with_entropy:
                self._add_entropy(rows.layer, attention)
        self._sums.setdefault(rows.layer, ByOrder()).add(rows.key_order, found)

    def sums(self, layer: int, order: Tensor) -> dict[str, Tensor]:
        if layer not in self._sums:  # there was nothing visual
            return {}
        found = self._sums[layer].of(order)
        sums = {"attention": found[:-1], "rows": found[-1]}
        if self._with_entropy:
            rows, total = self._entropy[layer]
            sums["entropy"] = total / rows
        return sums

    def _add_entropy(self, layer: int, attention: Tensor) -> None:
        kv_heads, group, count, _ = attention.shape
        before, total = self._entropy.get(layer, (0, attention.new_zeros(())))
        found = torch.special.entr(attention).sum() / (kv_heads * group)
        self._entropy[layer] = before + count, total + found


class RowScores:
    """What a trained head says about each row when it runs: "scores" [kv_heads, S]."""

    def __init__(self, score: Callable[[Rows], Tensor]) -> None:
        """`score` gives fp32 [kv_heads, n]."""
        self._score = score
        self._scores: dict[int, ByOrder] = {}

    def see(self, rows: Rows) -> None:
        self._scores.setdefault(rows.layer, ByOrder()).add(rows.order, self._score(rows))

    def sums(self, layer: int, order: Tensor) -> dict[str, Tensor]:
        return {} if layer not in self._scores else {"scores": self._scores[layer].of(order)}


class QueryMoments:
    """Mean "mean" [q_heads, d] and covariance "covariance" [q_heads, d, d] of queries before rotation.

    The first `skip` tokens of a prompt are left out.
    """

    def __init__(self, skip: int) -> None:
        self._skip = skip
        self._moments: dict[int, tuple[int, Tensor, Tensor]] = {}  # rows, mean, outer products

    def see(self, rows: Rows) -> None:
        counted = rows.order >= self._skip
        count = int(counted.sum())
        if count == 0:
            return
        queries = unrotated(rows.queries, rows.position, rows.frequencies)
        queries = queries[torch.from_numpy(counted).to(queries.device)].transpose(0, 1)
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        outer = centred.transpose(1, 2) @ centred
        if rows.layer in self._moments:
            before, old_mean, old_outer = self._moments[rows.layer]
            total, away = before + count, mean - old_mean
            outer = outer + old_outer + away[:, :, None] * away[:, None] * (before * count / total)
            mean, count = old_mean + away * (count / total), total
        self._moments[rows.layer] = count, mean, outer

    def sums(self, layer: int, order: Tensor) -> dict[str, Tensor]:
        if layer not in self._moments:
            return {}
        count, mean, outer = self._moments[layer]
        return {"mean": mean, "covariance": outer / count}


def unrotated(x: Tensor, position: NDArray[np.int32], frequencies: Tensor) -> Tensor:
    """Queries or keys [n, H, d] before they were turned to their positions, fp32."""
    back = torch.from_numpy(-position).to(x.device)
    return rotate(x.float(), *rope_angles(back, frequencies, torch.float32))


def expected_rotation(frequencies: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean cosine and sine, each fp32 [d], over `count` positions from `start` on."""
    positions = torch.arange(start, start + count, device=frequencies.device)
    cos, sin = rope_angles(positions, frequencies, torch.float32)
    return cos.mean((0, 1)), sin.mean((0, 1))
