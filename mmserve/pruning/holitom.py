"""HoliTom, outer part (arXiv 2505.21334): merge over time first, then thin out what is left in space.

Segments are cut where collapsing static positions saves most; static tokens are averaged over their
segment and clustered, the others are kept by saliency. Unlike the published code the number of
survivors is exact and the result deterministic. Knows nothing about the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmserve.pruning.base import Reduced
from mmserve.pruning.density import merge_clusters
from mmserve.pruning.protect import in_order
from mmserve.pruning.quotas import exact_quotas
from mmserve.pruning.segmentation import Bools, Ints, Segments, run_lengths, segment_frames
from mmserve.pruning.selection import leading, top_of_rows
from mmserve.pruning.settings import number, whole
from mmserve.pruning.windowed import WindowedPruner

# entries of the distance table built at once: 256 MiB in fp32
_MAX_DISTANCES = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class HoliTom(WindowedPruner):
    """Static tokens and those of each frame share the budget, which bounds what is merged over time."""

    name: ClassVar[str] = "holitom"
    paper: ClassVar[str] = "arXiv:2505.21334"

    tau: float | None = number(
        None,
        0,
        1,
        "the cosine above which a position is unchanged; none: 0.8, or 0.65 for keep of at most 0.1",
        low_open=True,
    )
    beta: float = number(0.6, 0, 1, "the share of a centre in its merged token")
    neighbours: int = whole(7, 1, 64, "the K of DPC-KNN")

    @property
    def threshold(self) -> float:
        if self.tau is not None:
            return self.tau
        return 0.65 if self.keep <= 0.1 else 0.8

    def _reduce_window(self, x: Tensor, saliency: Tensor, budget: int) -> Reduced:
        frames, tokens = saliency.shape
        # the only device-to-host copy: everything but which tokens win is then known on the host
        cosine = F.cosine_similarity(x[:-1], x[1:], dim=2).clamp(max=1).cpu().numpy()
        segments = segment_frames(cosine > self.threshold, budget)
        if budget >= frames * tokens - segments.removed:
            return _merge_most_similar(x, cosine, segments, budget)
        static_quotas, dynamic_quotas = _split_budget(segments, budget)
        fixed = self._cluster_static(x, segments, static_quotas)
        moving = _most_salient(x, saliency, segments, dynamic_quotas)
        return in_order(*(torch.cat(pair) for pair in zip(fixed, moving, strict=True)))

    def _cluster_static(self, x: Tensor, segments: Segments, quotas: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Average static tokens over their segment, then cluster each segment's to its quota."""
        live = np.flatnonzero(quotas)
        widest = int(segments.static[live].sum(axis=1).max(initial=1))
        step = max(1, _MAX_DISTANCES // widest**2)
        batches = [live[at : at + step] for at in range(0, len(live), step)]
        parts = [self._cluster_segments(x, segments, batch, quotas) for batch in batches]
        if not parts:
            return x.new_zeros(0, x.shape[2]), torch.zeros(0, dtype=torch.int64, device=x.device), _ones(x, 0)
        values, source, weight = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(source), torch.cat(weight)

    def _cluster_segments(
        self, x: Tensor, segments: Segments, chosen: Ints, quotas: Ints
    ) -> tuple[Tensor, Tensor, Tensor]:
        static, starts, stops = segments.static[chosen], segments.starts[chosen], segments.stops[chosen]
        sizes, counts = static.sum(axis=1), quotas[chosen]
        # static positions first, in order; the rest of each row is padding
        columns = np.argsort(~static, axis=1, kind="stable")[:, : sizes.max()]
        position = torch.from_numpy(columns).to(x.device)  # [G, M]
        spans = zip(starts.tolist(), stops.tolist(), strict=True)
        means = torch.stack([x[a:b].mean(dim=0) for a, b in spans])
        clusters = merge_clusters(
            means.gather(1, position[..., None].expand(-1, -1, x.shape[2])),
            sizes,
            counts,
            neighbours=self.neighbours,
            beta=self.beta,
        )
        group, slot = leading(counts, int(counts.max()), x.device)
        first = torch.from_numpy(starts).to(x.device)[group] * x.shape[1]
        copies = torch.from_numpy(stops - starts).to(x.device)[group]
        return (
            clusters.merged[group, slot],
            first + position[group, clusters.centre[group, slot]],
            (clusters.members[group, slot] * copies).to(torch.float32),
        )


def _split_budget(segments: Segments, budget: int) -> tuple[Ints, Ints]:
    """Quotas of each segment's static tokens [S] and of each frame's dynamic tokens [T]."""
    of_frame = segments.of_frame
    num_static = segments.static.sum(axis=1)
    num_dynamic = segments.static.shape[1] - num_static[of_frame]
    segment = np.concatenate([np.arange(len(num_static)), of_frame])
    # a segment's static group goes before its frames
    order = np.argsort(segment, kind="stable")
    quotas = np.zeros(len(segment), dtype=np.int64)
    quotas[order] = exact_quotas(np.concatenate([num_static, num_dynamic])[order], segment[order], budget)
    return quotas[: len(num_static)], quotas[len(num_static) :]


def _most_salient(
    x: Tensor, saliency: Tensor, segments: Segments, quotas: Ints
) -> tuple[Tensor, Tensor, Tensor]:
    """The most salient dynamic tokens of each frame, equal ones by position."""
    static = torch.from_numpy(segments.static[segments.of_frame]).to(x.device)
    source = top_of_rows(saliency.masked_fill(static, -torch.inf), quotas)
    return x.flatten(0, 1)[source], source, _ones(x, len(source))


def _merge_most_similar(x: Tensor, cosine: np.ndarray, segments: Segments, budget: int) -> Reduced:
    """Where merging over time alone would go below the budget, merge only the most similar neighbours.

    Each merge of a static token with the same position in the next frame removes exactly one token.
    """
    frames, tokens, _ = x.shape
    of_frame = segments.of_frame
    within = segments.static[of_frame[:-1]] & (of_frame[:-1] == of_frame[1:])[:, None]
    candidates = np.flatnonzero(within)
    best = np.argsort(-cosine.flat[candidates], kind="stable")[: frames * tokens - budget]
    joined: Bools = np.zeros_like(within)
    joined.flat[candidates[best]] = True

    length = run_lengths(joined) + 1
    heads = np.append(np.ones((1, tokens), dtype=np.bool_), ~joined, axis=0)
    source = np.flatnonzero(heads)
    weight = torch.from_numpy(length.flat[source]).to(x.device, torch.float32)
    last = torch.from_numpy(source + (length.flat[source] - 1) * tokens).to(x.device)
    # a running sum frame by frame, because scattered additions on a GPU come in any order
    join = torch.from_numpy(joined).to(x.device)[..., None]
    sums = [x[0]]
    for t in range(1, frames):
        sums.append(torch.where(join[t - 1], sums[-1] + x[t], x[t]))
    merged = torch.stack(sums).flatten(0, 1)[last] / weight[:, None]
    return Reduced(embeddings=merged, source=torch.from_numpy(source).to(x.device), weight=weight)


def _ones(x: Tensor, length: int) -> Tensor:
    return torch.ones(length, dtype=torch.float32, device=x.device)
