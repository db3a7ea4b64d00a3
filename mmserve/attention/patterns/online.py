"""What the last rows of a chunk look at, for heads whose lines are found online.

The last rows of each modality are probed, again when the prompt has grown by a quarter: lines found earlier
are lines of the same keys. Knows nothing about tiles or kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmserve.attention.base import ChunkView
from mmserve.attention.patterns.boundary import Gathered, Ints
from mmserve.attention.patterns.grid import find_grids, frame_stride
from mmserve.attention.patterns.grouping import ALL, TEXT
from mmserve.attention.patterns.outputs import Sample
from mmserve.attention.patterns.verticals import Picked, pick
from mmserve.attention.profile import Head, Lines
from mmserve.kernels.pattern_index import Probe, probe

PROBED_ROWS = 64
GROWTH = 1.25  # of the prompt, after which it is probed again
# rows whose outputs decide where weights do not, and their weights at most;
# again when the prompt has doubled
SAMPLED_ROWS, SAMPLED_WEIGHTS = 64, 1 << 18
SAMPLED_GROWTH = 2
CLEAR_LIFT = 0.5  # from here on they do
Group = Literal["all", "vision", "text"]
GROUPS: tuple[Group, ...] = ("all", "vision", "text")


class Parts(NamedTuple):
    """What some rows of a head do: with the keys of vision and of text, or with all as one group."""

    is_joint: bool
    first: Lines
    second: Lines


@dataclass(slots=True)
class Found:
    """Lines of the heads for the rows of one group; a head without a grid has stride 0."""

    slots: int  # of the prompt when they were found
    decided: int  # and when outputs decided for the last time
    stride: NDArray[np.int64]
    first: NDArray[np.int64]
    # by head, and 0 for keys of vision or all, 1 for those of text
    picked: dict[tuple[int, int], Picked] = field(default_factory=dict)


def is_split(head: Head) -> bool:
    """Whether rows of text are apart from those of vision."""
    return head.boundary in ("q", "2d")


def row_group(head: Head, kind: int) -> Group:
    if kind == TEXT:
        return "text"
    return "vision" if is_split(head) else "all"


def parts_of(head: Head, group: Group) -> Parts:
    """What the rows of a group do."""
    if head.boundary in ("no", "q"):
        lines = head.text if group == "text" else head.vision
        return Parts(True, lines, lines)
    if head.boundary == "k":
        return Parts(False, head.vision, head.text)
    if group == "text":
        return Parts(False, head.text_to_vision, head.text)
    return Parts(False, head.vision, head.vision_to_text)


def few_text(view: ChunkView) -> bool:
    """Whether a probe of the chunk's rows of text would cost as much as to let them see everything."""
    return int((~view.is_visual[view.rows]).sum()) <= PROBED_ROWS


def needs_probe(head: Head, group: Group) -> bool:
    parts = parts_of(head, group)
    return any(lines.pattern != "a_shape" for lines in (parts.first, parts.second))


def find_lines(
    view: ChunkView, gathered: Gathered, heads: Sequence[Head], min_lift: float
) -> Mapping[Group, Found]:
    """By group of rows; those are left out that have no rows here or look for nothing."""
    slots, count = len(view.is_visual), len(heads)
    known: dict[Group, Found] = {}
    if view.memory is not None:
        kept = view.memory.setdefault(view.layer, known)
        assert isinstance(kept, dict), "what is kept of a layer is this pattern's own"
        known = kept
    for group in GROUPS:
        members = [
            at
            for at, head in enumerate(heads)
            if (is_split(head) if group == "text" else row_group(head, ALL) == group)
            and needs_probe(head, group)
        ]
        rows = _rows_of(view, group)
        if not members or not len(rows) or (group == "text" and few_text(view)):
            continue
        old = known.get(group)
        if old is None or not old.slots <= slots < GROWTH * old.slots:
            found = Found(slots, slots, np.zeros(count, np.int64), np.zeros(count, np.int64))
            if old is not None and old.decided <= slots < SAMPLED_GROWTH * old.decided:
                found.decided = old.decided
                found.stride[:], found.first[:] = old.stride, old.first
            _find(_Prober(view, gathered, rows), heads, members, group, min_lift, found)
            known[group] = found
    return known


def _rows_of(view: ChunkView, group: Group) -> NDArray[np.int64]:
    is_visual = view.is_visual[view.rows]
    if group == "all":
        return np.arange(len(is_visual))
    return np.flatnonzero(is_visual if group == "vision" else ~is_visual)


class _Prober:
    """Weights of the last rows of a group over each group of keys, computed when they are asked for."""

    def __init__(self, view: ChunkView, gathered: Gathered, rows: NDArray[np.int64]) -> None:
        self.view, self.gathered = view, gathered
        self.rows = rows[-PROBED_ROWS:]
        sampled = max(1, min(SAMPLED_ROWS, SAMPLED_WEIGHTS // len(view.is_visual)))
        self._spread = rows[:: -(-len(rows) // sampled)]
        self.frame = frame_stride(view.frame, view.is_visual)
        self._known: dict[Group, tuple[Probe, int]] = {}
        self._on_host: dict[Group, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    @property
    def count(self) -> int:
        return len(self.rows)

    def over(self, group: Group) -> tuple[Probe, int]:
        """The sums, and how many keys of the group there are up to the last row."""
        if group not in self._known:
            self._known[group] = self._probe(group)
        return self._known[group]

    def on_host(self, group: Group) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Sums by key and by diagonal."""
        if group not in self._on_host:
            sums, _ = self.over(group)
            self._on_host[group] = sums.vertical.cpu().numpy(), sums.slash.cpu().numpy()
        return self._on_host[group]

    def heaviest(self, head: int, group: Group, lines: Lines) -> Tensor:
        """The single keys of a head that has no grid."""
        vertical, slash = self.on_host(group)
        picked = pick(
            vertical[head],
            slash[head],
            keys=max(lines.vertical, lines.otherwise),
            offsets=0,
            sink=lines.sink,
            local=lines.local,
            rows=self.count,
        )
        return torch.from_numpy(picked.keys).to(self.view.queries.device)

    def sample(self, head: int, group: Group, lines: Lines) -> Sample:
        """Rows all over the chunk, and what they see of a group of keys."""
        view, device = self.view, self.view.queries.device
        slots = _slots_of(self.gathered, group, int(view.rows[self.rows[-1]]) + 1)
        kv_head = head * view.keys.shape[1] // view.queries.shape[1]
        k, v = (_taken(part[:, kv_head], slots) for part in (view.keys, view.values))
        return Sample.of(
            view.queries[torch.from_numpy(self._spread).to(device), head],
            k,
            v,
            torch.from_numpy(view.rows[self._spread]).to(device),
            torch.from_numpy(slots).to(device),
            scale=view.scale,
            sink=lines.sink,
            local=lines.local,
        )

    def _probe(self, group: Group) -> tuple[Probe, int]:
        view, device = self.view, self.view.queries.device
        orders = view.rows[self.rows]
        stop = int(orders[-1]) + 1
        keys = _slots_of(self.gathered, group, stop)
        heads = view.queries.shape[1]
        if not len(keys):
            nothing = torch.zeros(heads, 0, device=device)
            return Probe(nothing, nothing), 0
        rows = torch.from_numpy(self.rows[-len(keys) :]).to(device)
        found = probe(
            view.queries[rows].contiguous(),
            _taken(view.keys, keys).contiguous(),
            torch.from_numpy(orders[-len(keys) :].copy()).to(device),
            torch.from_numpy(keys).to(device),
            scale=view.scale,
        )
        return found, len(keys)


def _slots_of(gathered: Gathered, group: Group, stop: int) -> Ints:
    """The slots of a group below `stop`."""
    seen = int(gathered.before[stop])
    if group == "all":
        return np.arange(stop, dtype=np.int32)
    if group == "vision":
        return gathered.slots[:seen]
    return gathered.slots[gathered.visual : gathered.visual + stop - seen]


def _taken(keys: Tensor, slots: Ints) -> Tensor:
    """Keys of ascending slots; a view where they are side by side."""
    if int(slots[-1]) - int(slots[0]) + 1 == len(slots):
        return keys[int(slots[0]) : int(slots[-1]) + 1]
    return keys.index_select(0, torch.from_numpy(slots).to(keys.device))


def _find(
    prober: _Prober,
    heads: Sequence[Head],
    members: Sequence[int],
    group: Group,
    min_lift: float,
    found: Found,
) -> None:
    """Fill in what the members have."""
    grids: dict[Group, list[int]] = {}
    picks: list[tuple[int, int, Group, Lines]] = []
    for at in members:
        parts = parts_of(heads[at], group)
        if parts.first.pattern == "grid":
            grids.setdefault("all" if heads[at].boundary == "no" else "vision", []).append(at)
        elif parts.first.pattern == "vertical_slash":
            picks.append((at, 0, "all" if parts.is_joint else "vision", parts.first))
        if not parts.is_joint and parts.second.pattern == "vertical_slash":
            picks.append((at, 1, "text", parts.second))
    for keys, askers in grids.items():
        _find_grids(prober, heads, askers, group, keys, min_lift, found)
        for at in askers:
            parts = parts_of(heads[at], group)
            lines = _beside(parts.first, int(found.stride[at]))
            picks.append((at, 0, "all" if parts.is_joint else "vision", lines))
    for at, part, keys, lines in picks:
        if not lines.vertical and not lines.slash:
            continue
        vertical, slash = prober.on_host(keys)
        if vertical.shape[1]:
            found.picked[at, part] = pick(
                vertical[at],
                slash[at],
                keys=lines.vertical,
                offsets=lines.slash,
                sink=lines.sink,
                local=lines.local,
                rows=prober.count,
            )


def _beside(lines: Lines, stride: int) -> Lines:
    """The single keys and diagonals of a head that was to have a grid, where it has one and where not."""
    if stride:
        return replace(lines, slash=0)
    return replace(lines, vertical=max(lines.vertical, lines.otherwise))


def _find_grids(
    prober: _Prober,
    heads: Sequence[Head],
    askers: Sequence[int],
    group: Group,
    keys: Group,
    min_lift: float,
    found: Found,
) -> None:
    """Grids of heads between their sinks and local bands: the widest of each, so that they share a search."""
    sums, total = prober.over(keys)
    lines = [parts_of(heads[at], group).first for at in askers]
    first = max(each.sink for each in lines)
    last = total - max(each.local for each in lines) - prober.count
    if not total or last <= first:
        # there was nothing to decide: next time there may be
        found.decided = 0
        return
    grids = find_grids(
        sums.vertical[askers],
        prober.frame,
        first=first,
        last=last,
        is_searched=np.array([each.stride == "searched" for each in lines]),
    )
    strides = np.where(grids.lift > min_lift, grids.stride, 0)
    for at, stride, start, lift in zip(askers, strides, grids.first, grids.lift, strict=True):
        own = parts_of(heads[at], group).first
        if own.vline and lift < CLEAR_LIFT:
            if found.decided < found.slots:
                continue
            stride, start = _by_outputs(prober, at, own, keys, int(stride))
        found.stride[at], found.first[at] = stride, start if stride else 0


def _by_outputs(prober: _Prober, head: int, lines: Lines, keys: Group, stride: int) -> tuple[int, int]:
    """The grid of a head whose weights show it not clearly, `stride` 0: not at all; 0 where it has none.

    The stride of frames is tried too, and what as many single keys would give as are taken without a grid.
    """
    sample = prober.sample(head, keys, lines)
    errors = sample.error_of_keys(prober.heaviest(head, keys, lines))[None]
    tried = [(0, 0)]
    for each in dict.fromkeys((stride, prober.frame or 0)):
        if each > 1:
            of_class = sample.errors_of_classes(each)
            errors = torch.cat([errors, of_class])
            tried += [(each, start) for start in range(each)]
    return tried[int(errors.argmin())]
