"""XAttention (arXiv 2503.16428, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import from_blocks, row_blocks, row_order
from mmserve.attention.patterns.scores import block_size, fewest, products
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.base import check_range
from mmserve.pruning.settings import check_values, number, setting

STRIDES = (1, 2, 4, 8, 16, 32, 64)


def _check_stride(name: str, value: object) -> None:
    if value not in STRIDES:
        raise BadRequest(f"Expected {name} to be one of {STRIDES}, but got {value!r:.40}")


@lru_cache(maxsize=8)
def _parsed(thresholds: str) -> tuple[tuple[float, ...], ...]:
    """Shares by layer and head; raises BadRequest."""
    if not thresholds:
        return ()
    try:
        layers = tuple(tuple(float(one) for one in layer.split(",")) for layer in thresholds.split(";"))
    except ValueError as error:
        raise BadRequest(f"Expected thresholds to be numbers, but got {thresholds[:40]!r}") from error
    for share in chain(*layers):
        check_range("thresholds", share, 0, 1)
    return layers


def _check_thresholds(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise BadRequest(f"Expected {name} to be text, but got {value!r:.40}")
    _parsed(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class XAttention(AttentionPattern):
    """Each block of rows sees the fewest blocks of keys whose antidiagonal sums hold the share `threshold`.

    Algorithm 1: cells of `stride` rows and keys; the sum of a cell's antidiagonal is one product of rows
    that are `stride` times as wide, the keys of the cell in order and its queries in reverse. A softmax
    over the cells of a row of cells (scale 1 / (stride sqrt(d)), causal by cells), its sums over blocks,
    then for each block of rows the fewest blocks that reach the share of all. As in the authors' code the
    first block and the own ones are always seen and count first. `thresholds` (section 2.3) are shares by
    head: all heads of a layer, separated by commas, layers by semicolons, one layer standing for all; "" is
    `threshold`. What differs: cells of rows are counted from the chunk's first row; products are taken per
    KV head.
    """

    name: ClassVar[str] = "xattention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16428"
    acts_at: ClassVar[Literal["prefill", "decode_step"]] = "prefill"

    threshold: float = number(0.9, 0, 1, "the share of the antidiagonal sums that is seen")
    stride: int = setting(16, "rows and keys of a cell, whose antidiagonal is summed", _check_stride)
    block: int = block_size(128, "rows and keys of a block")
    thresholds: str = setting("", "shares by head, comma, and layer, semicolon", _check_thresholds)

    def __post_init__(self) -> None:
        check_values(self)
        if self.block % self.stride:
            raise BadRequest(f"Expected a stride of up to {self.block}, a block, but got {self.stride}")

    @classmethod
    def everything(cls) -> Self:
        return cls(threshold=1.0)

    def check_model(self, *, layers: int, heads: int, width: int) -> None:
        known = _parsed(self.thresholds)
        if known and (len(known) not in (1, layers) or {len(layer) for layer in known} != {heads}):
            raise BadRequest(
                f"Expected thresholds of {heads} heads, for one layer or all {layers}, "
                f"but got {len(known)} layers, the first of {len(known[0])} heads"
            )

    def index(self, view: ChunkView) -> AttentionIndex:
        block = self.block
        rows = row_blocks(view, block)
        sums = _sums(view, self.stride, block // self.stride)
        places = torch.arange(sums.shape[2], device=sums.device)
        own = (places >= (rows.first // block)[:, None]) & (places <= (rows.last // block)[:, None])
        forced = own | (places == 0)
        share = self._shares(view)[:, None]
        need = share * sums.sum(-1) - sums.where(forced, 0).sum(-1)
        seen = fewest(sums.where(~forced, 0), need) | forced
        # rounding must not leave a block out where nothing is to be left out
        return from_blocks(view, rows, seen | (share >= 1)[..., None], block=block)

    def _shares(self, view: ChunkView) -> Tensor:
        heads, device = view.queries.shape[1], view.queries.device
        known = _parsed(self.thresholds)
        if not known:
            return torch.full((heads,), self.threshold, device=device)
        return torch.tensor(known[view.layer if len(known) > 1 else 0], device=device)


def _sums(view: ChunkView, stride: int, cells: int) -> Tensor:
    """Weights of cells summed over blocks of `cells` by `cells`: fp32 [Hq, row blocks, key blocks]."""
    rows, keys = _cells(view.queries, stride, reverse=True), _cells(view.keys, stride)
    scores = products(rows, keys).float() * (view.scale / stride)
    order = row_order(view)
    last = torch.arange(stride, len(order) + stride, stride, device=order.device).clamp(max=len(order)) - 1
    hidden = torch.arange(0, len(keys) * stride, stride, device=order.device) > order[last][:, None]
    weights = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)
    padded = functional.pad(weights, (0, -len(keys) % cells, 0, -len(rows) % cells))
    sums: Tensor = padded.unflatten(2, (-1, cells)).sum(-1).unflatten(1, (-1, cells)).sum(2)
    return sums


def _cells(x: Tensor, stride: int, *, reverse: bool = False) -> Tensor:
    """Every `stride` rows of x [N, H, d] side by side [cells, H, stride * d], zeros behind the last one."""
    padded = functional.pad(x, (0, 0, 0, 0, 0, -len(x) % stride))
    cells: Tensor = padded.unflatten(0, (-1, stride))
    return (cells.flip(1) if reverse else cells).transpose(1, 2).flatten(2)
