"""Tri-shape: A-shape whose last rows are dense. Knows nothing about scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.a_shape import (
    ALL,
    band_index,
    bands,
    frames_instead,
    local_slots,
    sink_slots,
)
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole


def last_rows() -> int:
    """The field `bottom`."""
    return whole(128, 0, ALL, "how many of the last rows of a chunk see everything")


@dataclass(frozen=True, slots=True, kw_only=True)
class TriShape(AttentionPattern):
    """As `a_shape`, but the last `bottom` rows see everything (SCBench; defaults of MMInference's tables).

    The paper knows one chunk, the whole prompt. A chunk does not know whether it is the last one, so that the
    last rows of each are dense: smaller chunks make the map denser.
    """

    name: ClassVar[str] = "tri_shape"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.10319"

    sink: int = sink_slots(128)
    local: int = local_slots(4096)
    local_frames: int = frames_instead()
    bottom: int = last_rows()

    @classmethod
    def everything(cls) -> Self:
        return cls(local=ALL)

    def index(self, view: ChunkView) -> AttentionIndex:
        start, begin = bands(view, self.local, self.local_frames)
        first = int(np.searchsorted(view.rows, len(view.keys) - self.bottom))
        if first < len(view.rows):
            above = start < first
            start, begin = np.append(start[above], first), np.append(begin[above], 0)
        return band_index(view, start, begin, self.sink)
