"""Where the tokens of each media item stand in a prompt, and what remains after reduction.

Pure numpy, so the dispatcher can use it. Knows nothing about how many tokens an item has: that is
each family's own file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmserve.errors import BadRequest, WireError

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A run of a prompt's rows: text, or what remains of a part of one item."""

    token_ids: NDArray[np.int64]
    order: IntArray  # index in the uncompressed prompt
    is_visual: bool

    def __len__(self) -> int:
        return len(self.order)


class Walk:
    """A way through a prompt from its beginning, as far as the lengths of its items are known.

    The caller alternates: text, then the parts of the next item, text, and so on.
    """

    def __init__(self, token_ids: Sequence[int], items: int, media_token_ids: Collection[int]) -> None:
        self._ids = np.asarray(token_ids, np.int64)
        self._places = _places(self._ids, items, media_token_ids)
        self._next = 0  # of `token_ids`
        self.item = 0  # whose placeholder comes next
        self.length = 0  # tokens of the uncompressed prompt that were passed

    @property
    def is_over(self) -> bool:
        return self._next == len(self._ids)

    def text(self) -> Rows:
        """The text up to the next placeholder or the end."""
        stop = self._places[self.item] if self.item < len(self._places) else len(self._ids)
        ids = self._ids[self._next : stop]
        self._next = int(stop)
        return Rows(ids, self._pass(len(ids)), False)

    def part(self, tokens: int, kept: IntArray) -> Rows:
        """The next `tokens` of the item here; `kept` are ascending indices among them."""
        inside = len(kept) == 0 or (kept[0] >= 0 and kept[-1] < tokens)
        if not inside or (np.diff(kept) <= 0).any():
            raise WireError(f"Expected ascending kept tokens below {tokens}, but got something else")
        return Rows(np.repeat(self._ids[self._next], len(kept)), self._pass(tokens)[kept], True)

    def leave_item(self) -> None:
        self._next += 1
        self.item += 1

    def _pass(self, tokens: int) -> IntArray:
        start, self.length = self.length, self.length + tokens
        return np.arange(start, self.length, dtype=np.int32)


def expand(
    token_ids: Sequence[int], counts: Sequence[int], media_token_ids: Collection[int]
) -> NDArray[np.int64]:
    """The uncompressed prompt, as transformers sees it: each placeholder as often as its item has tokens."""
    ids = np.asarray(token_ids, np.int64)
    repeats = np.ones(len(ids), np.int64)
    repeats[_places(ids, len(counts), media_token_ids)] = counts
    return np.repeat(ids, repeats)


def _places(ids: NDArray[np.int64], items: int, media_token_ids: Collection[int]) -> NDArray[np.intp]:
    places = np.flatnonzero(np.isin(ids, list(media_token_ids)))
    if len(places) != items:
        raise BadRequest(f"Expected {items} media placeholders in the prompt, but got {len(places)}")
    return places
