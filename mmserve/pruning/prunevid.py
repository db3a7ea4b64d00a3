"""PruneVid, the part before the language model (arXiv 2412.16117): merge over time, then in space.

Frames are clustered into segments; positions that stay alike over their segment are averaged, and density
peaks merge what is left of each segment and frame. Unlike the published code, segments are made contiguous
by one best cut between neighbouring centres, clusters share the budget in proportion to what they are made
of instead of by a fixed ratio, and fewer positions are averaged over time where all of them would leave
less than the budget. Knows neither saliency nor the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced, floor_share
from mmserve.pruning.density import cluster_rows, density_peaks
from mmserve.pruning.groups import group_by_head
from mmserve.pruning.quotas import exact_quotas
from mmserve.pruning.segmentation import Bools, Ints
from mmserve.pruning.settings import number, whole
from mmserve.pruning.windowed import WindowedPruner


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneVid(WindowedPruner):
    """A cluster becomes its plain mean."""

    name: ClassVar[str] = "prunevid"
    paper: ClassVar[str] = "arXiv:2412.16117"

    tau: float = number(
        0.8, -1, 1, "a position is static where pairs of its frames have a higher cosine on average"
    )
    segments: float = number(0.25, 0, 1, "segments per frame", low_open=True)
    neighbours: int = whole(7, 1, 64, "the K of DPC-KNN")

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        frames, tokens, _ = x.shape
        starts = self._starts(x.mean(dim=1))
        stops = np.append(starts[1:], frames)
        static = self._static(x, starts, stops, frames * tokens - budget)  # [S, N]
        of_frame = np.repeat(np.arange(len(starts)), stops - starts)
        # a static position stands in the first frame of its segment
        frame = np.where(static[of_frame], starts[of_frame][:, None], np.arange(frames)[:, None])
        head = torch.from_numpy(frame * tokens + np.arange(tokens)).to(x.device)
        once = group_by_head(head.flatten())
        values, members = once.mean(x.flatten(0, 1)), once.members.to(x.dtype)

        stays = np.flatnonzero(frame == np.arange(frames)[:, None])
        frame, position = np.divmod(stays, tokens)
        group = np.where(static[of_frame[frame], position], of_frame[frame], len(starts) + frame)
        sizes = np.bincount(group, minlength=len(starts) + frames)
        quotas = exact_quotas(sizes, np.zeros_like(sizes), budget)
        clusters = group_by_head(cluster_rows(values, group, quotas, neighbours=self.neighbours))
        return Reduced(
            embeddings=clusters.mean(values),
            source=once.source[clusters.source],
            weight=clusters.total(members).to(torch.float32),
        )

    def _starts(self, means: Tensor) -> Ints:
        """The first frames of segments around the density peaks of frame means [T, D]."""
        frames = len(means)
        count = np.array([max(1, floor_share(self.segments, frames))])
        peaks = density_peaks(means[None], np.array([frames]), count, neighbours=self.neighbours)
        centres = peaks.centre[0].sort().values
        distances = (means[:, None] - means[centres]).square().sum(dim=2).cpu().numpy()  # [T, C]
        starts = [0]
        for c, (left, right) in enumerate(pairwise(centres.tolist())):
            between = distances[left + 1 : right]
            # how much worse it is to leave frames to the left centre, up to each one
            worse = np.append(0, (between[:, c] - between[:, c + 1]).cumsum())
            starts.append(left + 1 + int(worse.argmin()))
        return np.array(starts, dtype=np.int64)

    def _static(self, x: Tensor, starts: Ints, stops: Ints, limit: int) -> Bools:
        """Positions averaged over each segment [S, N], the most alike that save at most `limit` tokens."""
        unit = F.normalize(x, dim=2)
        spans = [unit[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
        # the square of a sum holds every pair twice, and each vector with itself
        pairs = torch.stack([span.sum(dim=0).square().sum(1) - span.square().sum((0, 2)) for span in spans])
        length = (stops - starts)[:, None]
        alike = pairs.cpu().numpy() / np.maximum(length * (length - 1), 1)
        alike[length[:, 0] == 1] = -np.inf
        ranked = np.argsort(-alike, axis=None, kind="stable")
        saved = np.broadcast_to(length - 1, alike.shape).flat[ranked].cumsum()
        static = alike > self.tau
        static.flat[ranked[saved > limit]] = False
        return static
