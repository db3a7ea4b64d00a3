"""SnapKV (arXiv 2404.14469): keep the visual slots that the question looks at.

The observation window is the text after the last image or video, which carries the signal in
vision-language prompts (VL-Cache, arXiv 2410.23317). By default what kvpress does; the authors' code has
`window` 32, `pool` 7, `pooling` max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from mmserve.errors import BadRequest
from mmserve.kv.base import KVPolicy, LayerView, causal_attention
from mmserve.pruning.base import check_count
from mmserve.pruning.settings import setting, whole

MAX_WINDOW = 64  # as many queries of the question are there


def check_pool(name: str, value: object) -> None:
    check_count(name, value, 1, 63)
    if isinstance(value, int) and value % 2 == 0:
        raise BadRequest(f"Expected {name} to be odd, but got {value}")


def check_pooling(name: str, value: object) -> None:
    if value not in ("mean", "max"):
        raise BadRequest(f"Expected {name} to be mean or max, but got {value!r:.40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(KVPolicy):
    """Mean attention of the window to each visual slot, smoothed over neighbours, top slots per KV head."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv:2404.14469"
    needs_query: ClassVar[bool] = True

    window: int = whole(64, 1, MAX_WINDOW, "how many of the question's queries count at most, the last ones")
    pool: int = setting(5, "over how many neighbouring slots scores are smoothed; odd", check_pool)
    pooling: str = setting("mean", "how: mean or max", check_pooling)

    def scores(self, view: LayerView) -> Tensor:
        attention = question_attention(self.name, view, self.window).mean(-2)[..., view.visual]
        return pooled(attention, self.pool, self.pooling).mean(1)


def question_attention(kv: str, view: LayerView, window: int = MAX_WINDOW) -> Tensor:
    """What the last queries of the question pay to all slots, fp32 [kv_heads, group, n, S]."""
    queries, query_order = view.queries[-window:], view.query_order[-window:]
    if len(queries) == 0:
        raise BadRequest(f"Expected text after the last image or video for kv {kv}, but got none")
    return causal_attention(queries, query_order, view.keys, view.order)


def pooled(attention: Tensor, pool: int, pooling: str = "mean") -> Tensor:
    """Smoothed over neighbours of the last axis."""
    if attention.shape[-1] == 0:
        return attention
    flat, half = attention.flatten(0, -2), pool // 2
    if pooling == "max":
        return functional.max_pool1d(flat, pool, 1, half).view_as(attention)
    return functional.avg_pool1d(flat, pool, stride=1, padding=half).view_as(attention)
