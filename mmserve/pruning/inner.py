"""The contract of a method that thins out visual tokens inside the language model, and their registry.

Such a method acts while a prompt is prefilled, at the input of some layers; tokens that it drops have no KV
from there on. Knows nothing about pages, chunks or requests. Imports no torch before a method is asked for.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, cast

from mmserve.budget import Budget
from mmserve.errors import BadRequest
from mmserve.pruning.base import check_keep, check_settings
from mmserve.pruning.settings import check_values

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InnerView:
    """A prompt at the input of a layer: its rows from the first visual one on.

    What comes before them is seen only as `keys`: it may have been computed for another prompt.
    `queries` are of the last rows, which are text unless the prompt ends with an item; both are those
    of the layer before, rotated, and there are none at layer 0.
    """

    stage: int  # how many of the method's layers were passed
    stages: int  # how many there are
    entered: int  # reducible rows that the prompt had at first
    hidden: Tensor  # [n, D]
    is_visual: Tensor  # bool [n]
    is_reducible: Tensor  # bool [n]: visual, and not the newline that ends an item
    patch: Tensor  # int64 [n]: alike in rows of an item that show the same place of different frames
    queries: Tensor | None = None  # [m, Hq, d], m <= n
    keys: Tensor | None = None  # [Hkv, S, d], S >= n
    memory: Tensor | None = None  # what the stage before left

    def attention(self, last: int | None = None) -> Tensor:
        """What each of the `last` rows (by default all m) pays to every row here, mean over heads, [m, n]."""
        return self.head_attention(last).mean(0)

    def head_attention(self, last: int | None = None) -> Tensor:
        """The same of every head, fp32 [Hq, m, n]."""
        assert self.queries is not None, "there is no attention at layer 0"
        assert self.keys is not None, "keys come with queries"
        queries = self.queries if last is None else self.queries[-last:]
        rows, _, width = queries.shape
        heads, seen, _ = self.keys.shape
        grouped = queries.float().unflatten(1, (heads, -1)).movedim(0, 2)  # [Hkv, group, m, d]
        scores = grouped @ self.keys.float()[:, None].transpose(-1, -2) * width**-0.5
        later = scores.new_ones(rows, seen).triu(seen - rows + 1).bool()
        paid: Tensor = scores.masked_fill(later, float("-inf")).softmax(-1).flatten(0, 1)
        return paid[..., seen - len(self.hidden) :]


class Survivors(NamedTuple):
    """Rows of a view that go on, ascending, and what they hold from here on.

    Everything that is not reducible is among them. `memory` is for the method's next stage.
    """

    rows: Tensor  # int64 [k]
    hidden: Tensor  # [k, D]
    memory: Tensor | None = None


class InnerReducer(Protocol):
    """One method with its settings, deterministic. Implementations are frozen dataclasses, one per file."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    name: ClassVar[str]
    paper: ClassVar[str]
    needs_query: ClassVar[bool]
    needs_whole_item: ClassVar[bool]
    acts_at: ClassVar[str]
    count: ClassVar[Literal["exact"]]
    trained_weights: ClassVar[bool]
    drops_below: ClassVar[bool]

    @property
    def keep(self) -> float: ...

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """At whose inputs it acts, ascending, each below `num_layers`; none where a model is too shallow.

        Raises BadRequest where a setting asks for a layer that is not there.
        """
        ...

    def reduce(self, view: InnerView) -> Survivors: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerMethod(ABC):
    """A method that looks at the question, and keeps exactly max(1, floor(keep * n)) of n visual tokens.

    With `drops_below` what it drops also leaves the KV of the layers that were passed.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_query: ClassVar[bool] = True
    needs_whole_item: ClassVar[bool] = True
    acts_at: ClassVar[str]
    count: ClassVar[Literal["exact"]] = "exact"
    trained_weights: ClassVar[bool] = False
    drops_below: ClassVar[bool] = False

    keep: float

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_values(self)

    @abstractmethod
    def layers(self, num_layers: int) -> tuple[int, ...]: ...

    @abstractmethod
    def reduce(self, view: InnerView) -> Survivors: ...


REDUCERS: dict[str, str] = {
    "fastv": "mmserve.pruning.fastv:FastV",
    "holitom_m": "mmserve.pruning.holitom_m:HoliTomMerge",
    "cdpruner": "mmserve.pruning.cdpruner:CDPruner",
    "sparsevlm": "mmserve.pruning.sparsevlm:SparseVLM",
    "prunevid_m": "mmserve.pruning.prunevid_m:PruneVidInner",
    "framefusion_m": "mmserve.pruning.framefusion_m:FrameFusionInner",
    "flashvid_m": "mmserve.pruning.flashvid_m:FlashVIDInner",
    "dynamic_llava": "mmserve.pruning.dynamic_llava:DynamicLlava",
}


def load_reducer(name: str) -> type[InnerReducer]:
    """The class behind a registered name: a dataclass whose fields are its settings."""
    if name not in REDUCERS:
        raise BadRequest(f"Expected an inner method of {', '.join(REDUCERS)}, but got {name!r}")
    module, _, attribute = REDUCERS[name].partition(":")
    return cast("type[InnerReducer]", getattr(import_module(module), attribute))


def make_reducer(name: str, keep: Budget | None = None, **settings: object) -> InnerReducer:
    """Build a method that keeps the share `keep` of the tokens, or what its paper keeps.

    Wrong names or values raise BadRequest.
    """
    method = load_reducer(name)
    check_settings(name, method, settings)
    build = cast("Callable[..., InnerReducer]", method)
    return build(**settings) if keep is None else build(keep=keep, **settings)


def keep_top(view: InnerView, scores: Tensor, count: int) -> Tensor:
    """Rows to keep: of the reducible ones the `count` best by `scores` [n], and all others; int64, ascending.

    Ties go to the earlier row.
    """
    places = view.is_reducible.nonzero().flatten()
    # a stable descending sort resolves ties to the lower index
    best = scores[places].sort(descending=True, stable=True).indices[:count]
    kept = ~view.is_reducible
    kept[places[best]] = True
    return kept.nonzero().flatten()


def at_depth(depth: float, num_layers: int) -> tuple[int, ...]:
    """The layer at this share of a model's layers, at least one being before it; none in a model of one."""
    return (min(max(round(depth * num_layers), 1), num_layers - 1),) if num_layers > 1 else ()


def at_layer(method: str, layer: int | None, usual: int, num_layers: int) -> tuple[int, ...]:
    """The layer that was asked for, else the usual one or the last of a shallower model; none in one of one.

    Raises BadRequest where the model has no layer of the number asked for.
    """
    if layer is None:
        return (min(usual, num_layers - 1),) if num_layers > 1 else ()
    if layer >= num_layers:
        raise BadRequest(
            f"Expected a layer below {num_layers} with prune {method}, since the model has so many, "
            f"but got {layer}"
        )
    return (layer,)
