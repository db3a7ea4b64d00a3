"""Which of the lines that weights propose brings the outputs of some rows nearest to dense attention's.

Heavy keys are not always the ones that are missed: of a head that looks at very many keys, a regular sample
is closer to the mean of them all. Knows nothing about tiles, layouts or how lines are found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Sample(NamedTuple):
    """What some rows of one head see, each row with what its sink and local band give it."""

    values: Tensor  # fp32 [keys, d]
    rest: Tensor  # fp32 [rows, keys] weights outside sink and band
    near: Tensor  # fp32 [rows, d] sums of values inside, and their weight [rows]
    near_weight: Tensor
    dense: Tensor  # fp32 [rows, d]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, row_order: Tensor, key_order: Tensor,
        *, scale: float, sink: int, local: int,
    ) -> Sample:  # fmt: skip
        """Of queries q [rows, d], each of which sees a key at least; k and v [keys, d] ascend in order."""
        values = v.float()
        scores = q.float() @ k.float().T * scale
        scores = scores.masked_fill_(key_order > row_order[:, None], -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num_(0.0)
        seen = torch.searchsorted(key_order, row_order, right=True)[:, None]
        place = torch.arange(len(k), device=k.device)
        rest = weights.masked_fill((place < sink) | (place >= seen - local), 0.0)
        dense = weights @ values
        return cls(values, rest, dense - rest @ values, 1 - rest.sum(1), dense)

    def errors_of_classes(self, stride: int) -> Tensor:
        """The squared distance of the outputs with each class of a stride, fp32 [stride]."""
        short = -len(self.values) % stride
        by_class = pad(self.rest, (0, short)).view(len(self.rest), -1, stride)
        values = pad(self.values, (0, 0, 0, short)).view(-1, stride, self.values.shape[1])
        lines = torch.bmm(by_class.permute(2, 0, 1), values.transpose(0, 1))  # [stride, rows, d]
        return self._errors(lines, by_class.sum(1).T)

    def error_of_keys(self, keys: Tensor) -> Tensor:
        """The same with single keys; of no dimension."""
        rest = self.rest[:, keys]
        return self._errors((rest @ self.values[keys])[None], rest.sum(1)[None])[0]

    def _errors(self, lines: Tensor, weight: Tensor) -> Tensor:
        weight = (weight + self.near_weight).clamp(min=1e-30)
        return ((lines + self.near) / weight[..., None] - self.dense).square().sum((1, 2))
