"""TriangleMix: the lower layers dense, the upper ones Tri-shape. Knows nothing about scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.a_shape import ALL, frames_instead, local_slots, sink_slots
from mmserve.attention.patterns.tri_shape import TriShape, last_rows
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class TriangleMix(AttentionPattern):
    """Layers from `first_layer` on leave out the middle of the map, which matters little there.

    The paper finds the layer per model by a gradient probe; without one half of the layers are dense, as for
    its Llama-3.1-8B (16 of 32). The rest is as in `tri_shape`, the windows too.
    """

    name: ClassVar[str] = "triangle_mix"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.21526"

    first_layer: int | None = whole(None, 0, 1024, "the first sparse layer; -: the upper half is sparse")
    sink: int = sink_slots(128)
    local: int = local_slots(4096)
    local_frames: int = frames_instead()
    bottom: int = last_rows()

    @classmethod
    def everything(cls) -> Self:
        return cls(first_layer=0, local=ALL)

    def index(self, view: ChunkView) -> AttentionIndex | None:
        first = view.layers // 2 if self.first_layer is None else self.first_layer
        return None if view.layer < first else self._triangle().index(view)

    def _triangle(self) -> TriShape:
        return TriShape(sink=self.sink, local=self.local, local_frames=self.local_frames, bottom=self.bottom)
