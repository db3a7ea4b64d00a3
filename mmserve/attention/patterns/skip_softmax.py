"""BLASST: dense attention that leaves out blocks of keys which turn out not to matter.

Knows nothing about kernels, which do the leaving out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from mmserve.attention.base import AttentionPattern, ChunkView, Skipping
from mmserve.attention.patterns.a_shape import band_index
from mmserve.pruning.settings import number


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipSoftmax(AttentionPattern):
    """A block whose largest weight is below `scale` / (slots so far) of the largest so far is not multiplied.

    The threshold falls with the length, as the paper found it should. The default is what NVIDIA published
    for the prefill of Qwen3-30B to skip half of the blocks; it doubles for about every 8 % more. Scores are
    all computed, so the index is dense and its density 1: what is saved is the exponentials and the product
    with V.
    """

    name: ClassVar[str] = "skip_softmax"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.12087"

    scale: float = number(
        587.0, 0, 1e9, "over the slots so far: the share of a row's weight below which blocks go"
    )

    @classmethod
    def everything(cls) -> Self:
        return cls(scale=0.0)

    def index(self, view: ChunkView) -> Skipping:
        start = np.arange(0, len(view.rows), view.tile_rows)
        dense = band_index(view, start, np.zeros(len(start), np.int64), sink=0)
        # at 1 all but a row's largest blocks would go
        return Skipping(dense, min(self.scale / len(view.keys), 1.0))
