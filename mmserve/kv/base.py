"""What a KV policy is that acts at the end of prefill, and which exist.

A policy scores the visual slots of a layer and shares a budget out over heads and layers; `PageTable.keep`
frees the pages of what it leaves out. Text always stays. Knows nothing about pages or requests.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.errors import BadRequest
from mmserve.kv.allocation import Selection, top_per_head
from mmserve.pruning.base import check_settings
from mmserve.pruning.inner import InnerReducer
from mmserve.pruning.settings import check_values

# share of the visual slots that stays when nobody says how many
DEFAULT_BUDGET = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerView:
    """One layer of one sequence at the end of prefill, all heads still alike.

    `queries` are those of the text after the last image or video, in prompt order, then those of rows that
    the policy's probe ran after the prompt. `sums` is what the policy's observer has gathered.
    """

    layer: int
    layers: int  # of the model
    queries: Tensor  # [n, q_heads, d], rotated
    query_order: Tensor  # [n]
    keys: Tensor  # [kv_heads, S, d], rotated
    values: Tensor  # [kv_heads, S, d]
    visual: Tensor  # bool [S]
    order: Tensor  # [S]
    position: Tensor  # [S], RoPE positions
    next_position: int  # of the first token of the answer
    frequencies: Tensor  # fp32 [d / 2], of RoPE
    sums: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    left: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # by `scores`, for `weight`

    @property
    def visual_slots(self) -> Tensor:
        """Slots that may leave, int64 [visual]."""
        return self.visual.nonzero().flatten()


class Rows(NamedTuple):
    """Some rows of one prompt in one layer, while they run: the last slots that the prompt has so far.

    `read` gives K and V [kv_heads, S, d] of its slots, these rows' among them; `key_order` is theirs.
    """

    layer: int
    queries: Tensor  # [n, q_heads, d], rotated
    hidden: Tensor  # [n, D], what came into the layer's attention, normed
    order: NDArray[np.int32]  # [n]
    position: NDArray[np.int32]  # [n]
    key_order: NDArray[np.int32]  # [S]
    key_until: NDArray[np.int32] | None  # [S]: first order that does not see a slot; None: all see all
    frequencies: Tensor  # fp32 [d / 2], of RoPE
    read: Callable[[], tuple[Tensor, Tensor]]
    repeats: NDArray[np.int32] | None = None  # of a probe: the orders of the prompt that it repeats


class Probe(NamedTuple):
    """Rows that run after a prompt, to be looked at and forgotten before it is compressed.

    "repeat": the prompt from its first to its last visual row once more, `rows` at a time. "ahead": its last
    `rows` rows again, where the answer will be. "answer": the first tokens of the likeliest answer, so many.
    """

    kind: Literal["repeat", "ahead", "answer"]
    rows: int


class Observer(Protocol):
    """What a policy gathers of one prompt while it runs: sums, never all queries.

    It is shown every row from the first visual one on, chunk by chunk, and each chunk layer by layer; the
    result must not depend on how a prompt is cut, but for rounding.
    """

    def see(self, rows: Rows) -> None: ...

    def sums(self, layer: int, order: Tensor) -> dict[str, Tensor]:
        """What was gathered in a layer, for slots of these orders [S]."""
        ...


class Budgeted(NamedTuple):
    """How much may stay of every layer.

    `slots`: visual slots per head if all layers and heads get alike; `weights`: what the policy says that
    each layer weighs.
    """

    slots: Sequence[int]
    weights: Sequence[float]


class KVPolicy(ABC):
    """Chooses the visual slots that stay. Implementations are frozen dataclasses, one per file.

    Deterministic. `count` is "exact" where as much stays as the budget says, "bound" where less may.
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_query: ClassVar[bool] = False  # text after the last item
    needs_whole_item: ClassVar[bool] = True
    needs_all_layers: ClassVar[bool] = False  # budgets of layers depend on each other
    acts_at: ClassVar[Literal["prefill_end"]] = "prefill_end"
    granularity: ClassVar[Literal["token", "layer", "head"]] = "head"
    count: ClassVar[Literal["exact", "bound"]] = "exact"
    trained_weights: ClassVar[bool] = False
    merges: ClassVar[bool] = False  # what leaves goes into what stays

    def __post_init__(self) -> None:
        check_values(self)

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """Importance of every visual slot for every KV head, fp32 [kv_heads, visual slots]."""

    def weight(self, view: LayerView) -> float:
        """What a layer weighs where layers share a budget; asked after its `scores`."""
        return 1.0

    def allocate(self, scores: Sequence[Tensor], budget: Budgeted) -> list[Selection]:
        """Which visual slots stay in every layer, by the scores of all layers."""
        return top_per_head(scores, budget.slots)

    def observer(self) -> Observer | None:
        """A new one for a prompt, where more is needed than the text after the last item."""
        return None

    def reducer(self) -> InnerReducer | None:
        """What thins out tokens inside the model before, where that is a part of the method."""
        return None

    def probe(self) -> Probe | None:
        """What runs after the prompt; its rows are then all that the observer is shown, and their queries
        follow those of the question in `LayerView.queries`.
        """
        return None

    def merge(self, view: LayerView, head: int, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [kept, d] of the slots of a head that stay, with what leaves merged into them.

        `kept` and `evicted` are ascending slots of the layer, text among the kept ones.
        """
        return view.keys[head, kept], view.values[head, kept]


def visual_budget(budget: float, slots: int, visual: int) -> int:
    """How many of `visual` slots each head may keep, of `slots` in all.

    At most 1 is a share of the visual slots, above 1 slots per head in total: text always stays, so it counts
    only there.
    """
    if budget <= 1:
        # the small term undoes the rounding of 0.29 * 100 and the like; something visual always stays
        return min(max(int(budget * visual + 1e-6), 1), visual)
    return min(max(int(budget) - (slots - visual), 0), visual)


def slots_kept(visual: NDArray[np.bool_], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending slots of a layer that stay: text, and the visual ones with these indices."""
    kept = ~visual
    kept[np.flatnonzero(visual)[chosen]] = True
    return np.flatnonzero(kept)


def visible(query_order: Tensor, key_order: Tensor, key_until: Tensor | None = None) -> Tensor:
    """Which keys each query sees, bool [n, S]."""
    seen = key_order <= query_order[:, None]
    return seen if key_until is None else seen & (query_order[:, None] < key_until)


def causal_attention(
    queries: Tensor, query_order: Tensor, keys: Tensor, key_order: Tensor, key_until: Tensor | None = None
) -> Tensor:
    """fp32 [kv_heads, group, n, S]: what rotated queries [n, q_heads, d] pay to keys [kv_heads, S, d]."""
    kv_heads, _, width = keys.shape
    # the heads of a group as rows of one product: keys are not copied for each of them
    grouped = queries.float().mul(width**-0.5).transpose(0, 1).reshape(kv_heads, -1, width)
    logits = (grouped @ keys.float().transpose(1, 2)).unflatten(1, (-1, len(queries)))
    paid: Tensor = logits.masked_fill_(~visible(query_order, key_order, key_until), -torch.inf).softmax(-1)
    return paid


POLICIES = {
    "none": "mmserve.kv.policies.none:NoEviction",
    "random": "mmserve.kv.policies.random:RandomEviction",
    "snapkv": "mmserve.kv.policies.snapkv:SnapKV",
    "h2o": "mmserve.kv.policies.h2o:H2O",
    "expected": "mmserve.kv.policies.expected:ExpectedAttention",
    "adakv": "mmserve.kv.policies.adakv:AdaKV",
    "kvzip": "mmserve.kv.policies.kvzip:KVzip",
    "vl_cache": "mmserve.kv.policies.vl_cache:VLCache",
    "pyramidkv": "mmserve.kv.policies.pyramidkv:PyramidKV",
    "dynamickv": "mmserve.kv.policies.dynamickv:DynamicKV",
    "sagekv": "mmserve.kv.policies.sagekv:SageKV",
    "fastkv": "mmserve.kv.policies.fastkv:FastKV",
    "kvzap": "mmserve.kv.policies.kvzap:KVzap",
    "duo": "mmserve.kv.policies.duo:DuoAttention",
    "streaming": "mmserve.kv.policies.streaming:Streaming",
    "knorm": "mmserve.kv.policies.knorm:KeyNorm",
    "dapq": "mmserve.kv.policies.dapq:DapQ",
    "laq": "mmserve.kv.policies.laq:LookaheadQ",
    "elastic": "mmserve.kv.policies.elastic:ElasticCache",
    "look_m": "mmserve.kv.policies.look_m:LookM",
    "meda": "mmserve.kv.policies.meda:MEDA",
    "zipvl": "mmserve.kv.policies.zipvl:ZipVL",
    "locret": "mmserve.kv.policies.locret:Locret",
}


def load_policy(name: str) -> type[KVPolicy]:
    """The class behind a registered name: a dataclass whose fields are its settings."""
    if name not in POLICIES:
        raise BadRequest(f"Expected a KV method of {', '.join(POLICIES)}, but got {name}")
    module, factory = POLICIES[name].split(":")
    return cast("type[KVPolicy]", getattr(import_module(module), factory))


def make_policy(name: str, **settings: object) -> KVPolicy:
    """Build a policy; wrong names or values raise BadRequest."""
    policy = load_policy(name)
    check_settings(name, policy, settings)
    return cast("Callable[..., KVPolicy]", policy)(**settings)
