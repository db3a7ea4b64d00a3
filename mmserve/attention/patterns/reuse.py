"""IndexCache: layers that do not look for keys themselves see those that a layer below found.

Knows nothing about how a pattern finds them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmserve.attention.base import AttentionPattern, ChunkView, Skipping
from mmserve.kernels.prefill_attention import AttentionIndex

# where the memory of a prompt has what was found; patterns use the layers from 0 on
_FOUND = -1


class _Found(NamedTuple):
    layer: int
    rows: NDArray[np.int32]
    slots: int
    said: AttentionIndex | Skipping | None


def reused_index(pattern: AttentionPattern, view: ChunkView, every: int) -> AttentionIndex | Skipping | None:
    """What the pattern says of a chunk in the first of every `every` sparse layers; the others repeat it.

    IndexCache's models have one index for all heads and learn or measure which layers may share; here layers
    share evenly and each head keeps to what the same head found. A layer with other rows or slots than the
    one below, where tokens were dropped between them, looks itself.
    """
    if every == 1:
        return pattern.index(view)
    assert view.memory is not None, "what was found is kept with the prompt"
    known = view.memory.get(_FOUND)
    if isinstance(known, _Found) and 0 < view.layer - known.layer < every and _is_alike(known, view):
        return known.said
    found = pattern.index(view)
    view.memory[_FOUND] = _Found(view.layer, view.rows, len(view.keys), found)
    return found


def _is_alike(known: _Found, view: ChunkView) -> bool:
    return known.slots == len(view.keys) and np.array_equal(known.rows, view.rows)
