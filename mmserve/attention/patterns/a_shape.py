"""A-shape, StreamingLLM's mask (arXiv 2309.17453): the first keys and a band of the latest ones.

Static: it looks at no score. Also the band that other patterns are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.kernels.prefill_attention.index import TILE_FIELDS
from mmserve.pruning.settings import whole

ROWS = 128  # that share a band counted in tokens: it begins where that of the first of them does
ALL = 2**31 - 1

Slots = NDArray[np.integer]


def sink_slots(default: int) -> int:
    """The field `sink`."""
    return whole(default, 0, ALL, "how many of the first slots every row sees")


def local_slots(default: int) -> int:
    """The field `local`."""
    return whole(default, 1, ALL, "how many of the latest slots, its own among them")


def frames_instead() -> int:
    """The field `local_frames`."""
    return whole(0, 0, ALL, "instead of these so many of the latest frames, where above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AShape(AttentionPattern):
    """Every row sees the first `sink` slots, and the last `local` ones up to and with its own.

    With `local_frames` above 0 the band is instead as many whole frames, the row's own being the last one,
    and the text between them; for text, the frame before it counts as its own.
    """

    name: ClassVar[str] = "a_shape"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    sink: int = sink_slots(128)
    local: int = local_slots(4096)
    local_frames: int = frames_instead()

    @classmethod
    def everything(cls) -> Self:
        return cls(local=ALL)

    def index(self, view: ChunkView) -> AttentionIndex:
        return band_index(view, *bands(view, self.local, self.local_frames), self.sink)


def bands(view: ChunkView, local: int, local_frames: int) -> tuple[Slots, Slots]:
    """Where blocks of rows begin, and the slot where the band of each does; frames count if there are any."""
    if local_frames:
        return frame_bands(view, local_frames)
    start = np.arange(0, len(view.rows), ROWS)
    return start, np.maximum(view.rows[start].astype(np.int64) - local + 1, 0)


def frame_bands(view: ChunkView, frames: int) -> tuple[Slots, Slots]:
    """Rows cut where a frame begins, and the slot where the band of each of these blocks of rows does."""
    # text is of the frame before it
    frame = np.maximum.accumulate(view.frame)
    of_rows = frame[view.rows]
    start = np.flatnonzero(np.diff(of_rows, prepend=of_rows[:1] - 1))
    return start, np.searchsorted(frame, of_rows[start] - (frames - 1))


def band_index(view: ChunkView, start: Slots, begin: Slots, sink: int) -> AttentionIndex:
    """Rows from start[i] on, up to the next block, see the first `sink` slots and those from begin[i] on."""
    n, heads, device = len(view.rows), view.queries.shape[1], view.queries.device
    # no tile is higher than `tile_rows`
    high = np.diff(start, append=n)
    parts = -(-high // view.tile_rows)
    which = np.repeat(np.arange(len(start)), parts)
    first = start[which] + (np.arange(len(which)) - (np.cumsum(parts) - parts)[which]) * view.tile_rows
    stop = np.append(first[1:], n)
    runs = np.ones((len(which), 2, 3), np.int32)
    # a band that reaches the sink is one run with it
    reaches = begin[which] <= sink
    runs[:, 0, 0] = 0
    runs[:, 0, 2] = sink
    runs[:, 1, 0] = np.where(reaches, 0, begin[which])
    runs[:, 1, 2] = view.rows[stop - 1] + 1 - runs[:, 1, 0]
    apart = 1 - (reaches | (sink == 0)).astype(np.int32)
    tiles = np.zeros((len(which), heads, TILE_FIELDS), np.int32)
    tiles[..., 1] = np.arange(heads)
    tiles[..., 2], tiles[..., 3] = first[:, None], (stop - first)[:, None]
    tiles[..., 4], tiles[..., 5] = (2 * np.arange(len(which)) + 1 - apart)[:, None], (1 + apart)[:, None]
    # longest first
    tiles = tiles[np.argsort(-(runs[:, 1, 2] + sink * apart), kind="stable")]
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    return AttentionIndex(
        tile_rows=view.tile_rows,
        block_size=view.tile_rows,
        tiles=torch.from_numpy(tiles.reshape(-1, TILE_FIELDS)).to(device),
        rows=torch.arange(n, dtype=torch.int32, device=device),
        runs=torch.from_numpy(runs.reshape(-1, 3)).to(device),
        blocks=nothing,
        columns=nothing,
        row_order=torch.from_numpy(view.rows).to(device),
        key_begin=torch.zeros(1, view.keys.shape[1], dtype=torch.int64, device=device),
    )
