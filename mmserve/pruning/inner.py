"""The contract of a method that thins out visual tokens inside the language model, and their registry.

Such a method acts while a prompt is prefilled, at the input of some layers; tokens that it drops have no KV
from there on. Knows nothing about pages, chunks or requests. Imports no torch before a method is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, cast

from mmserve.budget import Budget
from mmserve.errors import BadRequest
from mmserve.pruning.base import check_settings

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
    queries: Tensor | None = None  # [m, Hq, d], m <= n
    keys: Tensor | None = None  # [Hkv, S, d], S >= n
    memory: Tensor | None = None  # what the stage before left

    def attention(self, last: int | None = None) -> Tensor:
        """What each of the `last` rows (by default all m) pays to every row here, fp32 [m, n].

        The mean over heads.
        """
        assert self.queries is not None, "there is no attention at layer 0"
        assert self.keys is not None, "keys come with queries"
        queries = self.queries if last is None else self.queries[-last:]
        rows, _, width = queries.shape
        heads, seen, _ = self.keys.shape
        grouped = queries.float().unflatten(1, (heads, -1)).movedim(0, 2)  # [Hkv, group, m, d]
        scores = grouped @ self.keys.float()[:, None].transpose(-1, -2) * width**-0.5
        later = scores.new_ones(rows, seen).triu(seen - rows + 1).bool()
        paid: Tensor = scores.masked_fill(later, float("-inf")).softmax(-1).mean((0, 1))
        return paid[:, seen - len(self.hidden) :]


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

    @property
    def keep(self) -> float: ...

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """At whose inputs it acts, ascending, each below `num_layers`; none where a model is too shallow."""
        ...

    def reduce(self, view: InnerView) -> Survivors: ...


REDUCERS: dict[str, str] = {
    "fastv": "mmserve.pruning.fastv:FastV",
    "holitom_m": "mmserve.pruning.holitom_m:HoliTomMerge",
    "cdpruner": "mmserve.pruning.cdpruner:CDPruner",
    "sparsevlm": "mmserve.pruning.sparsevlm:SparseVLM",
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
