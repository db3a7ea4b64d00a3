"""CDPruner (arXiv 2506.10967): keep the tokens that are most diverse, given what the question asks about.

The paper compares tokens and question in CLIP's space. The checkpoints here have no text tower that fits
theirs, so the question is what the language model itself reads: its token embeddings. Nor is relevance
turned around, as the published code does for LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import InnerMethod, InnerView, Survivors
from mmserve.pruning.settings import share_kept

_SMALL = 1e-6  # where so little of a token is new, the rest is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class CDPruner(InnerMethod):
    """Keep the share `keep` before the first layer, chosen greedily by a determinantal point process.

    Its kernel is diag(r) S diag(r): S the cosines between tokens, r the mean cosine to the text behind the
    first item, from 0 to 1.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "arXiv:2506.10967"
    acts_at: ClassVar[str] = "embeddings"

    keep: float = share_kept(0.25)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        return (0,)

    def reduce(self, view: InnerView) -> Survivors:
        places = view.is_reducible.nonzero().flatten()
        tokens = normalize(view.hidden[places].float(), dim=1)
        question = normalize(view.hidden[~view.is_visual].float(), dim=1)
        chosen = most_diverse(tokens, relevance(tokens, question), exact_count(self.keep, view.entered))
        kept = ~view.is_reducible
        kept[places[chosen]] = True
        rows = kept.nonzero().flatten()
        return Survivors(rows, view.hidden[rows])


def relevance(tokens: Tensor, question: Tensor) -> Tensor:
    """Mean cosine of each of `tokens` [N, D] to those of the question, from 0 to 1; all are of length 1."""
    if len(question) == 0:
        return tokens.new_ones(len(tokens))
    found = tokens @ question.mean(0)
    low, high = found.aminmax()
    return (found - low + _SMALL) / (high - low + _SMALL)


def most_diverse(tokens: Tensor, weight: Tensor, count: int) -> Tensor:
    """`count` of `tokens` [N, D] of length 1, each time the one that adds most to the determinant.

    One row of the kernel's Cholesky factor per choice (Chen et al., arXiv 1709.05135). When the chosen ones
    span all others, weight decides; ties go to the earlier token.
    """
    total = len(tokens)
    if count == total:
        return torch.arange(total, device=tokens.device)
    factor = tokens.new_empty(count, total)
    left = weight.square()  # of each token's own entry, what the chosen ones do not explain
    limit = _SMALL * float(left.max())
    chosen: list[int] = []
    while len(chosen) < count:
        best = int(left.argmax())
        if float(left[best]) <= limit:
            break
        step = len(chosen)
        row = tokens @ tokens[best] * weight * weight[best] - factor[:step, best] @ factor[:step]
        factor[step] = row / left[best].sqrt()
        left = left - factor[step].square()
        left[best] = -torch.inf
        chosen.append(best)
    found = torch.tensor(chosen, dtype=torch.long, device=tokens.device)
    others = weight.clone()
    others[found] = -torch.inf
    rest = others.sort(descending=True, stable=True).indices[: count - len(found)]
    return torch.cat([found, rest])
