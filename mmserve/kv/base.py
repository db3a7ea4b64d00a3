"""What a KV policy is and which exist. A policy only chooses slots; `PageTable.keep` frees pages.

Knows nothing about pages or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmserve.errors import BadRequest

Selection = list[NDArray[np.int64]]  # per KV head: ascending slot indices to keep


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """One layer of one sequence at the end of prefill, all heads still alike.

    `queries` are those of the text after the last image or video, in prompt order.
    """

    layer: int
    queries: Tensor  # [n, q_heads, d], rotated
    query_order: Tensor  # [n]
    keys: Tensor  # [kv_heads, S, d], rotated
    values: Tensor  # [kv_heads, S, d]
    visual: Tensor  # bool [S]
    order: Tensor  # [S]
    budget: float  # at most 1: share of visual slots; above 1: slots per head in total

    @property
    def visual_budget(self) -> int:
        """How many visual slots each head may keep. Text always stays, so it counts only above 1."""
        visual = int(self.visual.sum())
        if self.budget <= 1:
            # the small term undoes the rounding of 0.29 * 100 and the like; something visual always stays
            return min(max(int(self.budget * visual + 1e-6), 1), visual)
        return min(max(int(self.budget) - (len(self.visual) - visual), 0), visual)


class KVPolicy(Protocol):
    """Chooses the slots that stay. Implementations are frozen dataclasses, one per file."""

    @property
    def name(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def needs_query(self) -> bool: ...
    @property
    def needs_whole_item(self) -> bool: ...
    @property
    def needs_all_layers(self) -> bool: ...
    @property
    def acts_at(self) -> Literal["prefill_end", "decode_step"]: ...
    @property
    def granularity(self) -> Literal["token", "layer", "head"]: ...
    @property
    def count(self) -> Literal["exact", "bound"]: ...

    def select(self, view: LayerView) -> Selection: ...


# share of the visual slots that stays when nobody says how many
DEFAULT_BUDGET = 0.25

POLICIES = {
    "none": "mmserve.kv.none:NoEviction",
    "random": "mmserve.kv.random:RandomEviction",
    "snapkv": "mmserve.kv.snapkv:SnapKV",
}


def load_policy(name: str) -> KVPolicy:
    """The policy of this name with its default parameters."""
    if name not in POLICIES:
        raise BadRequest(f"Expected a KV method of {', '.join(POLICIES)}, but got {name}")
    module, factory = POLICIES[name].split(":")
    return cast(KVPolicy, getattr(import_module(module), factory)())
