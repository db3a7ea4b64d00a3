"""Where the tokens of each media item stand in a prompt, and what remains after reduction.

Pure numpy, so the dispatcher can use it. Knows nothing about how many tokens an item has: that is
each family's own file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.errors import BadRequest, WireError

IntArray = NDArray[np.int32]


class Span(NamedTuple):
    """The run of one item's tokens in the uncompressed prompt."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """The uncompressed prompt as transformers would see it; `spans` in the order of the items."""

    token_ids: NDArray[np.int64]
    spans: tuple[Span, ...]


class Survivors(NamedTuple):
    """What is prefilled: one entry per row, in prompt order."""

    order: IntArray  # index in the uncompressed prompt
    position: IntArray  # RoPE position
    is_visual: NDArray[np.bool_]


def expand(token_ids: Sequence[int], counts: Sequence[int], media_token_ids: Collection[int]) -> PromptLayout:
    """Repeat each placeholder (any of `media_token_ids`) as often as its item has tokens."""
    ids = np.asarray(token_ids, np.int64)
    places = np.flatnonzero(np.isin(ids, list(media_token_ids)))
    if len(places) != len(counts):
        raise BadRequest(f"Expected {len(counts)} media placeholders in the prompt, but got {len(places)}")
    repeats = np.ones(len(ids), np.int64)
    repeats[places] = counts
    starts = np.cumsum(repeats) - repeats
    spans = tuple(Span(int(start), int(count)) for start, count in zip(starts[places], counts, strict=True))
    return PromptLayout(np.repeat(ids, repeats), spans)


def expand_tokens(
    token_ids: Sequence[int], counts: Sequence[int], media_token_ids: Collection[int]
) -> tuple[int, ...]:
    """The token ids of the uncompressed prompt."""
    return tuple(expand(token_ids, counts, media_token_ids).token_ids.tolist())


def kept_rows(layout: PromptLayout, kept: Sequence[IntArray | None]) -> tuple[IntArray, NDArray[np.bool_]]:
    """Orders of the rows that remain, and which are visual.

    `kept` holds ascending indices inside each item, None for all of it.
    """
    remains = np.ones(len(layout.token_ids), np.bool_)
    visual = np.zeros(len(layout.token_ids), np.bool_)
    for span, indices in zip(layout.spans, kept, strict=True):
        visual[span.start : span.start + span.length] = True
        if indices is None:
            continue
        inside = len(indices) == 0 or (indices[0] >= 0 and indices[-1] < span.length)
        if not inside or (np.diff(indices) <= 0).any():
            raise WireError(f"Expected ascending kept tokens below {span.length}, but got something else")
        remains[span.start : span.start + span.length] = False
        remains[span.start + indices] = True
    return np.flatnonzero(remains).astype(np.int32), visual[remains]
