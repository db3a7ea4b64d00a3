"""MMInference (arXiv 2504.16083): lines inside a modality, cut where modalities begin and end.

Every head has lines for the rows and keys of each modality: a sink and a local band, and between them
single keys and diagonals, or the lines of a grid, whose stride and place are found online. A profile says
which lines a head has; without one all heads look for a grid among vision, and take the heaviest keys where
there is none. Keys are gathered by modality without being moved: the axis of the index lists vision first.

Knows nothing about pages, chunks' rules or how a profile is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.boundary import gather
from mmserve.attention.patterns.grouping import ALL
from mmserve.attention.patterns.lines import build_index
from mmserve.attention.patterns.online import find_lines, row_group
from mmserve.attention.profile import BOUNDARIES, Boundary, Head, Lines, load_profile
from mmserve.errors import BadRequest
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import check_values, number, setting, whole

MOST = 1 << 30  # keys: more than any prompt has


def check_boundary(name: str, value: object) -> None:
    if value not in BOUNDARIES:
        raise BadRequest(f"Expected {name} to be one of {', '.join(BOUNDARIES)}, but got {value!r:.40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MMInference(AttentionPattern):
    """Sizes are for heads without a profile, in tokens of a modality."""

    name: ClassVar[str] = "mminference"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.16083"

    sink: int = whole(128, 0, MOST, "how many of the first tokens of a modality every row sees")
    local: int = whole(1024, 1, MOST, "how many of the latest tokens of a modality, its own among them")
    vertical: int | None = whole(
        None, 0, MOST, "how many single keys; -: as many as local where there is no grid, none beside one"
    )
    slash: int = whole(0, 0, MOST, "how many diagonals, where there is no grid")
    boundary: str = setting("2d", "where modalities are cut: no, k, q or 2d", check_boundary)
    min_lift: float = number(0.1, 0, 1, "the least share of weight, above an even one, that makes a grid")
    profile: str = setting("", "which lines each head has; only a deployment names it: --attention-profile")

    def __post_init__(self) -> None:
        check_values(self)
        if self.profile:
            load_profile(self.profile)

    @classmethod
    def everything(cls) -> Self:
        return cls(local=MOST)

    def check_model(self, *, layers: int, heads: int, width: int) -> None:
        if self.profile:
            load_profile(self.profile).check_model(layers, heads)

    def index(self, view: ChunkView) -> AttentionIndex:
        return index_of(view, self.heads_of(view), self.min_lift)

    def of_head(self, view: ChunkView, head: int) -> str:
        own = self.heads_of(view)[head]
        text = own.vision.pattern.replace("_", "-")
        if own.vision.pattern == "grid":
            group = row_group(own, ALL)
            found = find_lines(view, gather(view.is_visual), self.heads_of(view), self.min_lift).get(group)
            stride = 0 if found is None else int(found.stride[head])
            text = f"grid of {stride}" if stride else "vertical-slash"
        return f"{text}, {own.boundary.upper()}-boundary"

    def heads_of(self, view: ChunkView) -> Sequence[Head]:
        """What the heads of a layer do."""
        heads = view.queries.shape[1]
        if self.profile:
            return load_profile(self.profile).heads[view.layer]
        otherwise = self.local if self.vertical is None else self.vertical
        windows = Lines(sink=self.sink, local=self.local)
        single = replace(windows, pattern="vertical_slash", vertical=otherwise, slash=self.slash)
        grid = replace(single, pattern="grid", vertical=self.vertical or 0, otherwise=otherwise)
        head = Head(
            boundary=cast("Boundary", self.boundary),
            vision=replace(grid, vline=True, hline=True),
            text=single,
            vision_to_text=windows,
            text_to_vision=single,
        )
        return (head,) * heads


def index_of(view: ChunkView, heads: Sequence[Head], min_lift: float) -> AttentionIndex:
    """What the rows of a chunk see where its heads do this."""
    gathered = gather(view.is_visual)
    return build_index(view, gathered, heads, find_lines(view, gathered, heads, min_lift))
