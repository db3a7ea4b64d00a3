"""Tri-shape: A-shape whose last rows are dense. Knows nothing about scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.a_shape import ALL, band_index, bands
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.base import check_count


@dataclass(frozen=True, slots=True, kw_only=True)
class TriShape:
    """As `a_shape`, but the last `bottom` rows see everything (SCBench; defaults of MMInference's tables).

    The paper knows one chunk, the whole prompt. A chunk does not know whether it is the last one, so that the
    last rows of each are dense: smaller chunks make the map denser.
    """

    name: ClassVar[str] = "tri_shape"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.10319"
    acts_at: ClassVar[Literal["prefill"]] = "prefill"
    needs_query: ClassVar[bool] = False
    needs_whole_item: ClassVar[bool] = False
    count: ClassVar[Literal["bound"]] = "bound"
    trained_weights: ClassVar[bool] = False

    sink: int = 128
    local: int = 4096
    local_frames: int = 0
    bottom: int = 128

    def __post_init__(self) -> None:
        check_count("sink", self.sink, 0, ALL)
        check_count("local", self.local, 1, ALL)
        check_count("local_frames", self.local_frames, 0, ALL)
        check_count("bottom", self.bottom, 0, ALL)

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
