"""SnapKV (arXiv 2404.14469): keep the visual slots that the question looks at.

The observation window is the text after the last image or video, which carries the signal in
vision-language prompts (VL-Cache, arXiv 2410.23317); text slots always stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmserve.errors import BadRequest
from mmserve.kv.base import LayerView, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV:
    """Mean attention of the window to each visual slot, smoothed over neighbours, top slots per KV head.

    `window` is the largest number of queries, the last ones count; `pool` the width of the average
    over neighbouring visual slots (odd).
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    needs_query: ClassVar[bool] = True
    needs_whole_item: ClassVar[bool] = True
    needs_all_layers: ClassVar[bool] = False
    acts_at: ClassVar[Literal["prefill_end"]] = "prefill_end"
    granularity: ClassVar[Literal["head"]] = "head"
    count: ClassVar[Literal["exact"]] = "exact"

    window: int = 64
    pool: int = 5

    def select(self, view: LayerView) -> Selection:
        text, visual = (mask.nonzero().flatten() for mask in (~view.visual, view.visual))
        if view.visual_budget == len(visual):
            return [np.arange(len(view.visual)) for _ in range(len(view.keys))]
        scores = self.scores(view)
        # a stable descending sort resolves ties to the lower index
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices[:, : view.visual_budget]
        return [torch.cat([text, visual[row]]).sort().values.cpu().numpy().astype(np.int64) for row in ranked]

    def scores(self, view: LayerView) -> Tensor:
        """Importance of every visual slot for every KV head, fp32 [kv_heads, visual slots]."""
        queries, query_order = view.queries[-self.window :].float(), view.query_order[-self.window :]
        if len(queries) == 0:
            raise BadRequest("Expected text after the last image or video for kv snapkv, but got none")
        kv_heads, _, width = view.keys.shape
        grouped = queries.transpose(0, 1).unflatten(0, (kv_heads, -1))  # [kv_heads, group, n, d]
        logits = grouped @ view.keys.float()[:, None].transpose(-1, -2) * width**-0.5
        logits = logits.masked_fill(view.order > query_order[:, None], -torch.inf)
        attention = logits.softmax(-1).mean(-2)[..., view.visual]  # [kv_heads, group, visual]
        smooth = functional.avg_pool1d(attention, self.pool, stride=1, padding=self.pool // 2)
        return smooth.mean(1)
