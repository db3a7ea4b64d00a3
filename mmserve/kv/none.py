"""The KV policy that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mmserve.kv.base import LayerView, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class NoEviction:
    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = False
    needs_all_layers: ClassVar[bool] = False
    acts_at: ClassVar[Literal["prefill_end"]] = "prefill_end"
    granularity: ClassVar[Literal["token"]] = "token"
    count: ClassVar[Literal["exact"]] = "exact"

    def select(self, view: LayerView) -> Selection:
        return [np.arange(len(view.visual)) for _ in range(len(view.keys))]
