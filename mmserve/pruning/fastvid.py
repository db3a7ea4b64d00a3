"""FastVID (arXiv 2503.11187): segments of alike frames; salient tokens of each frame, density peaks of some.

Every few frames of a segment one is an anchor, whose density peaks take in all tokens of the segment
that nothing else keeps. Unlike the published code, frame means stand for the tower's pooled frames and
saliency for the pooling head's attention, anchors stand closer where a frame has too few tokens for its
share, and what is an anchor of one frame is not merged into another's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.absorption import assign_by_cosine
from mmserve.pruning.base import Reduced, floor_share
from mmserve.pruning.density import peak_scores
from mmserve.pruning.protect import in_order
from mmserve.pruning.quotas import Floats, Ints, even_quotas
from mmserve.pruning.selection import marks, top_of_rows
from mmserve.pruning.settings import number, whole
from mmserve.pruning.windowed import WindowedPruner, kept


class Anchor(NamedTuple):
    """A frame that provides `peaks` merged tokens for the frames from `start` to `stop`, excluded.

    `siblings` is how many frames of the segment do, itself included.
    """

    frame: int
    start: int
    stop: int
    peaks: int
    siblings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FastVID(WindowedPruner):
    """Each frame has an even share of the count; anchors are counted from the last frame of a segment."""

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = "arXiv:2503.11187"

    segments: int = whole(8, 1, 65536, "the least number of segments of a window")
    tau: float = number(0.9, -1, 1, "a window is cut wherever two frames have a lower cosine")
    context: float = number(0.4, 0, 1, "the share of a frame that it gives to merged tokens")
    stride: int = whole(4, 1, 65536, "every so many frames of a segment one provides merged tokens")
    neighbours: int = whole(4, 1, 64, "the K of the density")
    beta: float = number(0.6, 0, 1, "the least share that an anchor keeps in its merged token")

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        quotas = even_quotas(len(x), budget)
        context = np.array([floor_share(self.context, int(quota)) for quota in quotas])
        salient = top_of_rows(saliency, quotas - context)
        rest = ~marks(salient, *saliency.shape)
        means = x.mean(dim=1)
        # the only device-to-host copy
        cosine = F.cosine_similarity(means[:-1], means[1:], dim=1).double().cpu().numpy()
        anchors = self._anchors(self._starts(cosine), context, x.shape[1] - (quotas - context))
        if not anchors:
            return kept(x, salient.sort().values)
        source, values, weight = self._merge(x, rest, anchors)
        return in_order(
            torch.cat([x.flatten(0, 1)[salient], values]),
            torch.cat([salient, source]),
            torch.cat([torch.ones_like(salient, dtype=torch.float32), weight]),
        )

    def _starts(self, cosine: Floats) -> Ints:
        """First frames of the segments: the lowest similarities are cuts, and all below `tau`."""
        is_cut = cosine < self.tau
        is_cut[np.argsort(cosine, kind="stable")[: self.segments - 1]] = True
        return np.append(0, np.flatnonzero(is_cut) + 1)

    def _anchors(self, starts: Ints, context: Ints, room: Ints) -> list[Anchor]:
        """Share each segment's merged tokens among its anchors; `room` [T] is what a frame can provide."""
        anchors: list[Anchor] = []
        for start, stop in zip(starts, np.append(starts[1:], len(context)), strict=True):
            total = int(context[start:stop].sum())
            for stride in range(self.stride, 0, -1):
                frames = np.arange(stop - 1, start - 1, -stride)[::-1]
                counts = even_quotas(len(frames), total)
                if (counts <= room[frames]).all():
                    break
            shares = [(int(t), int(count)) for t, count in zip(frames, counts, strict=True) if count]
            anchors += [Anchor(t, int(start), int(stop), count, len(shares)) for t, count in shares]
        return anchors

    def _merge(self, x: Tensor, rest: Tensor, anchors: list[Anchor]) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the anchors' density peaks, what becomes of them, and how many tokens each is."""
        tokens = x.shape[1]
        counts = np.array([anchor.peaks for anchor in anchors])
        frame = torch.tensor([anchor.frame for anchor in anchors], device=x.device)
        peaks = top_of_rows(peak_scores(x[frame], rest[frame], self.neighbours), counts)
        source = frame[peaks // tokens] * tokens + peaks % tokens
        loose = rest & ~marks(source, *rest.shape)
        unit = F.normalize(x, dim=2)
        values, weight = [], []
        for anchor, own in zip(anchors, source.split(counts.tolist()), strict=True):
            span = slice(anchor.start, anchor.stop)
            heads = unit.flatten(0, 1)[own][None]
            used = torch.ones(1, anchor.peaks, dtype=torch.bool, device=x.device)
            assigned = assign_by_cosine(
                heads, used, unit[span].flatten(0, 1)[None], loose[span].reshape(1, -1)
            ).squeeze(0)
            absorbed = assigned.sum(dim=1)
            mean = (assigned @ x[span].flatten(0, 1)) / absorbed.clamp(min=1)[:, None]
            share = (1 / (absorbed + 1)).clamp(min=self.beta)[:, None]
            values.append(share * x.flatten(0, 1)[own] + (1 - share) * mean)
            # every anchor of the segment takes in all loose tokens: each counts in parts
            weight.append((1 + absorbed / anchor.siblings).to(torch.float32))
        return source, torch.cat(values), torch.cat(weight)
