"""LoopServe's online sparsification: vertical and slash lines, taken greedily up to a share of the attention.

Knows nothing about pages or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from mmserve.attention.base import AttentionPattern, ChunkView
from mmserve.attention.patterns.assemble import assemble, row_blocks
from mmserve.attention.patterns.scores import last_rows
from mmserve.attention.patterns.vertical_slash import columns_of, runs_of, slashes_of
from mmserve.kernels.prefill_attention import AttentionIndex
from mmserve.pruning.settings import number, whole

BLOCK = 64  # rows that share what they see
# what a round takes of the attention that is missing, and at least of all; lines of a round do not know of
# each other
SHARE, LEAST = 0.25, 0.02
# most lines of a round
LINES = 1024


class Lines(NamedTuple):
    """Chosen lines of each head, bool [heads, slots]."""

    vertical: Tensor  # by key
    slash: Tensor  # by how far the key lies before its row


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopServe(AttentionPattern):
    """Each head's lines are the fewest, taken greedily, that cover `recall` of the attention of sampled rows.

    What a line adds is what no line before it covers. The paper samples the new turn's rows; here they are
    `samples` rows at even distances that end with the chunk's last one, so that every chunk, over all slots
    so far, is a turn. Gain alone decides, as all lines are as long as a chunk; but 64 rows share what one of
    them sees, so that a slash computes 64 keys for each that was counted. Lines are taken in rounds rather
    than one by one. The paper's compression of the cache while decoding is a KV policy, not this.
    """

    name: ClassVar[str] = "loopserve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.13681"

    recall: float = number(0.955, 0, 1, "the share of the attention that lines cover", low_open=True)
    samples: int = whole(16, 1, 1024, "how many rows of a chunk are asked")

    @classmethod
    def everything(cls) -> Self:
        return cls(recall=1.0)

    def index(self, view: ChunkView) -> AttentionIndex:
        rows, lines = row_blocks(view, BLOCK), self._lines(view)
        slashes = slashes_of(lines.slash, int((rows.last - rows.first).max()) + 1)
        count = lines.vertical.sum(-1)
        inside = torch.arange(int(count.max()), device=count.device) < count[:, None]
        # behind all rows where a head has fewer
        columns = torch.full(inside.shape, len(view.keys), device=count.device)
        columns[inside] = lines.vertical.nonzero()[:, 1]
        return assemble(view, rows, runs=runs_of(rows, slashes), columns=columns_of(rows, columns, slashes))

    def _lines(self, view: ChunkView) -> Lines:
        slots, n, device = int(view.rows[-1]) + 1, len(view.rows), view.queries.device
        if self.recall == 1:
            none = torch.zeros(view.queries.shape[1], slots, dtype=torch.bool, device=device)
            return Lines(none, ~none)
        following = last_rows(view, n)
        samples = min(self.samples, following)
        step = following // samples
        back = step * torch.arange(samples - 1, -1, -1, device=device)
        hidden = torch.arange(slots, device=device) > (slots - 1 - back)[:, None]
        queries = view.queries[n - 1 - back].float().unflatten(1, (view.keys.shape[1], -1))
        found = []
        for head, keys in enumerate(view.keys[:slots].float().unbind(1)):
            scores = queries[:, head].transpose(0, 1) @ keys.T * view.scale
            weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
            found.append(greedy_lines(weights, step, self.recall))
        lines = Lines(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        # every row sees itself
        lines.slash[:, 0] = True
        return lines


def greedy_lines(weights: Tensor, step: int, recall: float, share: float = SHARE) -> Lines:
    """Lines that cover `recall` of weights [heads, rows, slots], the last row of which is the last slot.

    Rows are `step` apart. A round takes lines of largest gain up to `share` of what is missing, with 0 one.
    """
    found = [_greedy(of_head, step, recall, share) for of_head in weights]
    return Lines(*(torch.stack(lines) for lines in zip(*found, strict=True)))


def _greedy(weights: Tensor, step: int, recall: float, share: float) -> Lines:
    """Of one head, [rows, slots]."""
    rows, slots = weights.shape
    row = torch.arange(rows, device=weights.device)[:, None]
    place = slots - 1 - (rows - 1 - row) * step
    # shifted so that diagonals are columns: those `back` places before their row are column slots - 1 - back
    width = slots + rows * step
    left = weights.new_zeros(rows, width)
    by_key = left.as_strided((rows, slots), (width - step, 1), (rows - 1) * step)
    by_key.copy_(weights)
    gain = torch.cat([by_key.sum(0), left[:, :slots].sum(0).flip(0)])
    need = float(gain[:slots].sum()) - (1 - recall) * rows
    while need > 0:
        best = gain.topk(min(LINES, 2 * slots))
        goal = min(need, max(need * share, LEAST * share * rows))
        before = best.values.cumsum(0) - best.values
        taken = best.indices[(before <= goal) & (best.values > -torch.inf)]
        if len(taken) == 0:
            break
        gain[taken] = -torch.inf
        key, back = taken[taken < slots], taken[taken >= slots] - slots
        got = by_key[:, key]
        by_key[:, key] = 0.0
        # weights behind a row are 0
        gain[slots:].index_add_(0, (place - key).clamp(min=0).flatten(), -got.flatten())
        need -= float(got.sum())
        got = left[:, slots - 1 - back]
        left[:, slots - 1 - back] = 0.0
        gain[:slots].index_add_(0, (place - back).clamp(min=0).flatten(), -got.flatten())
        need -= float(got.sum())
    taken_lines = gain == -torch.inf
    return Lines(taken_lines[:slots], taken_lines[slots:])
