"""Rows that the engine runs: those of a prompt, and an answer's newest one.

Knows nothing about pages or steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.selection import Quest
from mmserve.attention.sparse import PromptPattern, SlotKinds, SparseRows
from mmserve.engine.groups import LayerGroups
from mmserve.kv.base import Observer
from mmserve.pruning.carriers import FOREVER

MAX_OBSERVED = 64  # text queries after the last visual token that KV policies see


@dataclass(slots=True, kw_only=True)
class PromptRows:
    """A prompt to run: one row per surviving token; until it `is_whole`, as far as it is known.

    `order` is each row's index in the uncompressed prompt, `position` its RoPE position. With `groups` of
    layers, rows and `done` are those of the group that is passed now, and `embeddings` its inputs.
    Where not all later rows see a row, `until` is the first order that does not, or `FOREVER`; what no row to
    come sees is dropped, so that there are at most `most_slots` at a time. With a `pattern`, `item` and
    `frame` say what each row shows; as in `attention.base.ChunkView`.
    """

    embeddings: Tensor  # [n or more, D]
    order: NDArray[np.int32]
    position: NDArray[np.int32]
    is_visual: NDArray[np.bool_]
    item: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # with `pattern`
    frame: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    pattern: PromptPattern | None = None
    until: NDArray[np.int32] | None = None
    most_slots: int | None = None
    is_whole: bool = True
    is_observed: bool = False  # keep the queries that a KV policy wants to see
    wants_logits: bool = False  # of every row
    is_reducible: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))  # with `groups`
    patch: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # as in `InnerView`
    groups: LayerGroups | None = None
    done: int = 0
    cached: int = 0  # slots whose KV was there already
    headroom: int = 0  # slots that are its own behind the prompt
    observed: dict[int, list[Tensor]] = field(default_factory=dict)  # by layer, per chunk [rows, Hq, d]
    observer: Observer | None = None  # of the KV policy that will act on it
    failure: Exception | None = None  # of the observer: the prompt's own, not that of all in its step
    logits: Tensor | None = None  # fp32 [V], of its last row once that is over

    def __len__(self) -> int:
        return len(self.order)

    @property
    def layers(self) -> range | None:
        """Those that its rows pass now; None for all."""
        return None if self.groups is None else self.groups.layers

    @property
    def ready(self) -> int:
        if self.groups is not None and not self.groups.layers:
            return self.done
        return rows_ready(len(self), is_whole=self.is_whole, is_observed=self.is_observed)

    @property
    def slots(self) -> int:
        """Slots per head that it takes at most at a time."""
        return len(self.embeddings) if self.most_slots is None else self.most_slots

    def sparse_rows(self, stop: int) -> SparseRows | None:
        """What the rows before `stop` are, for the pattern of those that run now."""
        if self.pattern is None:
            return None
        kinds = SlotKinds(self.is_visual[:stop], self.item[:stop], self.frame[:stop])
        return SparseRows(self.pattern, kinds, is_end=self.is_whole and stop == len(self))

    def until_of(self, order: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """Until when slots of these orders are seen; None where all are for ever."""
        return None if self.until is None else self.until[np.searchsorted(self.order, order)]

    def is_seen(self, order: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which slots of these orders are seen by any row that is not done."""
        until = self.until_of(order)
        if until is None:
            return np.ones(len(order), np.bool_)
        following = self.order[self.done] if self.done < len(self) else self.order[-1] + 1
        seen: NDArray[np.bool_] = until > following
        return seen

    @property
    def first_observed(self) -> int:
        return first_observed(self.is_visual)

    @property
    def is_over(self) -> bool:
        """Whether all rows have passed all layers."""
        is_last = self.groups is None or self.groups.is_last
        return is_last and self.is_whole and self.done == len(self)

    @property
    def is_due(self) -> bool:
        """Whether all rows have passed a group of layers, and another one comes."""
        if self.groups is None or self.groups.is_last or not self.is_whole:
            return False
        return self.done == len(self) or not self.groups.layers


def row_after(slots: int, until: NDArray[np.int32] | None) -> int:
    """The row at which a prompt begins whose first `slots` lasting rows are cached."""
    if until is None or slots == 0:
        return slots
    return int(np.flatnonzero(until == FOREVER)[slots - 1]) + 1


def rows_ready(known: int, *, is_whole: bool, is_observed: bool) -> int:
    """How many leading rows of a prompt may be run.

    While more can come, those are kept back that may turn out to be observed, and one at least, since the
    last row is what the first token is drawn from.
    """
    if is_whole:
        return known
    return max(known - (MAX_OBSERVED if is_observed else 1), 0)


def first_observed(is_visual: NDArray[np.bool_]) -> int:
    """The rows from here on are text after the last visual token, at most `MAX_OBSERVED`."""
    visual = np.flatnonzero(is_visual)
    after = int(visual[-1]) + 1 if len(visual) else 0
    return max(min(after, len(is_visual) - 1), len(is_visual) - MAX_OBSERVED)


def first_visual(is_visual: NDArray[np.bool_]) -> int:
    """How many rows of text come before all items."""
    return int(is_visual.argmax()) if is_visual.any() else len(is_visual)


def most_cached(is_visual: NDArray[np.bool_], *, is_observed: bool) -> int:
    """How many leading rows may come from the cache; the others are needed for what they compute."""
    return first_observed(is_visual) if is_observed else len(is_visual) - 1


@dataclass(slots=True)
class DecodeRow:
    """The newest token of a running sequence: its id and where it goes."""

    token: int
    order: int
    position: int
    selector: Quest | None = None  # where it reads only some pages
